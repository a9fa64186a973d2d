import pytest
import torch
from scoring_models import Wavy

from callbacks import EvaluationCallback
from labn import evaluate
from labn.metrics import MetricEntry, PatchInsertionDeletion, RelevanceMass, metric_by_name, register_metric
from labn.metrics.registry import REGISTRY, check_settings

NAMES = ["id", "pid4", "insertion2", "deletion2", "fill_probability", "mass", "pointing", "rank", "auroc"]
NAMES += ["id@official", "pid4@official", "insertion2@stable", "id@stable", "deletion4@official", "pid2@random"]
NAMES += ["errors_id", "id@threshold"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_key_of_the_scores(name):
    images, maps = torch.randn(1, 3, 8, 8), torch.rand(1, 8, 8)
    metric = metric_by_name(name.split("_id")[0], mean=[0.5] * 3, std=[0.2] * 3)
    one = torch.ones(1, dtype=torch.long)
    model = Wavy(192).float()
    scores = metric.score(model, images, maps, one, one, masks=maps > 0.5)
    assert scores[name].shape == (1,)


def test_names_set_patch_size_protocol_and_ties():
    metric = metric_by_name("pid8@official", step=3)
    assert isinstance(metric, PatchInsertionDeletion)
    assert (metric.patch_size, metric.protocol, metric.step) == (8, "official", 3)
    assert metric_by_name("insertion32@stable").ties == "stable"
    assert metric_by_name("pid1").names == metric_by_name("id").names


def test_shared_settings_reach_the_metrics_that_have_them():
    assert metric_by_name("pid8", fill="mean", positives_only=True).fill == "mean"
    assert isinstance(metric_by_name("mass", fill="mean"), RelevanceMass)
    with pytest.raises(TypeError, match="no metric has a setting 'fil'"):
        metric_by_name("mass", fil="mean")


def test_settings_without_effect_are_refused():
    check_settings(["pid8", "mass"], ["fill", "step"])
    check_settings(["pctin", "pctin10"], ["percents"])
    check_settings(["pid8@official", "pid8"], ["ties"])
    with pytest.raises(
        TypeError, match="'fill' would have no effect: the metrics mass, average_drop have no such setting"
    ):
        check_settings(["mass", "average_drop"], ["fill"])
    with pytest.raises(
        TypeError, match="'patch_size' would have no effect: the metrics pid8, id contain it in their names"
    ):
        check_settings(["pid8", "id"], ["patch_size"])
    with pytest.raises(TypeError, match="'n_stages' would have no effect"):
        EvaluationCallback(["id"], metric_options={"n_stages": 2})
    images, maps = torch.randn(1, 3, 8, 8), torch.rand(1, 8, 8)
    with pytest.raises(TypeError, match="'patch_size' would have no effect"):
        evaluate(Wavy(192).float(), images, maps, [1], ["pid8"], patch_size=4)


@pytest.mark.parametrize(("name", "near"), [("pid16@offical", "pid16@official"), ("masss", "mass"), ("pid0", "pid1")])
def test_error_of_an_unknown_name_lists_similar_names(name, near):
    with pytest.raises(ValueError, match=f"unknown metric '{name}'; similar names: .*{near}"):
        metric_by_name(name)


def test_a_registered_metric_is_found_by_name(monkeypatch):
    class Other(RelevanceMass):
        name = "other"

    monkeypatch.setattr("labn.metrics.registry.REGISTRY", list(REGISTRY))
    register_metric(MetricEntry("other", Other, lambda match: {}, ("other",)))
    assert isinstance(metric_by_name("other"), Other)
