"""What a stage leaves in its folder: what the present command has made, and maps and scores of earlier ones."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_callbacks import Counted, data, network, rows, trainer
from torch.utils.data import DataLoader

from callbacks import EvaluationCallback, ExplanationCallback, MapLogger, ReportCallback
from labn.metrics import MetricEntry, SampleMetric, SampleScores
from labn.metrics.registry import REGISTRY
from labn.results.store import ResultStore

STEP = {"metric_options": {"step": 3}}


def run(folder, *callbacks, batch_size=3, **options):
    trainer(folder, *callbacks, **options).test(network(), data(batch_size=batch_size), verbose=False)


def everything():
    """Callbacks that leave every kind of file."""
    score = EvaluationCallback(["errors", "pid16"], metric_options={"step": 3, "n_failures": 5})
    return ExplanationCallback({"counted": Counted()}), score, MapLogger(max_images=3), ReportCallback()


def made(stage):
    """Name -> content of what is made of maps and scores."""
    files = [path for path in stage.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {str(p.relative_to(stage)): p.read_bytes() for p in files if p.parent.name != "scores"}


def kept(stage):
    return {p: p.stat().st_mtime_ns for kind in ("maps/*.safetensors", "scores/*") for p in stage.glob(kind)}


@pytest.mark.slow
def test_a_second_test_replaces_tables_and_pictures_and_keeps_maps_and_scores(tmp_path):
    stage = tmp_path / "test"
    run(tmp_path, *everything())
    first, computed = made(stage), kept(stage)
    assert {"counts.csv", "curves.npz", "scores.csv"} < first.keys()
    assert len(computed) == 3 * 3 * 2
    few = ExplanationCallback({"counted": Counted()}, test_images=2)
    run(tmp_path, few, MapLogger(max_images=1), ReportCallback())
    second = made(stage)
    names = {"cards.json", "identity.json", "maps/manifest.json", "report.html", "overlays/000000-test_00000.png"}
    assert second.keys() == names
    assert b"pid16" not in second["report.html"]
    assert kept(stage) == computed
    callbacks = everything()
    run(tmp_path, *callbacks)
    assert made(stage) == first
    assert kept(stage) == computed
    assert callbacks[0].explainers["counted"]._seen == []


def test_no_rank_writes_before_rank_zero_has_removed_old_files(tmp_path, monkeypatch):
    happened = []

    def noted(owner, name, event):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: happened.append(event) or real(*given, **named))

    noted(ResultStore, "remove_derived", "removed")
    noted(SingleDeviceStrategy, "barrier", "barrier")
    noted(ResultStore, "add_maps", "written")
    run(tmp_path, ExplanationCallback({"counted": Counted()}))
    events = [event for event, before in zip(happened, ["", *happened]) if event != before]
    assert events[events.index("removed") :][:3] == ["removed", "barrier", "written"]


def test_the_manifest_is_written_without_metrics(tmp_path):
    explain = ExplanationCallback({"gradcam": None}, target="prediction")
    run(tmp_path / "alone", explain)
    run(tmp_path / "scored", explain, EvaluationCallback(["pid16"], baselines=False, **STEP))
    alone, scored = (
        json.loads((tmp_path / n / "test" / "maps" / "manifest.json").read_text()) for n in ("alone", "scored")
    )
    assert alone["explainers"]["gradcam"]["class"] == "labn.explainers.cam.GradCAM"
    assert alone["target"] == "prediction"
    assert {"checkpoint", "network", "data", "split", "class_names", "versions"} < alone.keys()
    assert scored.keys() - alone.keys() == {"metrics", "settings", "sources", "positive_classes", "samples"}
    assert {name: scored[name] for name in alone} == alone


def test_the_manifest_is_written_at_the_start_of_a_stage(tmp_path):
    class Looks(Counted):
        def attribute(self, *arguments):
            assert (tmp_path / "test" / "maps" / "manifest.json").is_file()
            return super().attribute(*arguments)

    run(tmp_path, ExplanationCallback({"looks": Looks()}))


def test_missing_scored_samples_cause_a_warning(tmp_path, monkeypatch):
    add = ResultStore.add_scores

    def elsewhere(store, part):
        """As another process does that has other settings."""
        if part.index[0] >= 3:
            part.keys = dict.fromkeys(part.keys, "another")
        add(store, part)

    monkeypatch.setattr(ResultStore, "add_scores", elsewhere)
    score = EvaluationCallback(["pid16"], explainers={"random": None}, baselines=False, **STEP)
    with pytest.warns(UserWarning, match="the tables lack 4 of 7 scored samples"):
        run(tmp_path, score)
    assert {row["index"] for row in rows(tmp_path / "test")} == {"0", "1", "2"}


@pytest.mark.slow
def test_samples_outside_the_subset_cause_no_warning(tmp_path):
    def score(**options):
        return EvaluationCallback(["pid16", "mass"], explainers={"random": None}, baselines=False, **options)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the tables lack")
        run(tmp_path, score(**STEP))
        run(tmp_path, score(**STEP, positives_only=True))
        run(tmp_path, score(**STEP, fill="mean", test_images=2))
        run(tmp_path, score(**STEP, fill="blur"), limit_test_batches=1)
        run(tmp_path, score(metric_options={"step": 5}), batch_size=2)
        trainer(tmp_path, score(val_metrics=[]), max_epochs=1).fit(network(), data())


def test_without_metrics_no_scores_are_reported_as_read_from_disk(tmp_path, caplog):
    score = EvaluationCallback(["pid16"], val_metrics=[], explainers={"random": None})
    with caplog.at_level("INFO"):
        trainer(tmp_path, score, max_epochs=1).fit(network(), data())
    assert "from disk" not in caplog.text


def test_pictures_of_a_killed_test_with_other_settings_are_removed(tmp_path, monkeypatch):
    def cards(folder, fill, batch_size):
        score = EvaluationCallback(["pid16"], explainers={"gradcam": None}, fill=fill, baselines=False, **STEP)
        run(folder, score, ReportCallback(), batch_size=batch_size)
        return folder / "test" / "cards.json"

    with monkeypatch.context() as patched:
        patched.setattr(ReportCallback, "publish", lambda self, trainer, pl_module, split: None)
        assert not cards(tmp_path / "killed", "black", 2).exists()
    assert list((tmp_path / "killed" / "test" / "cards").iterdir())
    again, undisturbed = (cards(tmp_path / name, "mean", 4).read_bytes() for name in ("killed", "whole"))
    assert again == undisturbed


class Own(SampleMetric):
    """A metric from outside of the project."""

    def __init__(self, **kwargs):
        super().__init__(["own"], **kwargs)

    def score_batch(self, batch):
        return SampleScores({"own": batch.maps.double().mean((1, 2)) * 0 + FACTOR})


FACTOR = 1.0


def test_editing_a_foreign_metric_computes_its_scores_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "labn.metrics.registry.REGISTRY", [*REGISTRY, MetricEntry("own", Own, lambda match: {}, ("own",))]
    )

    def scores(source):
        monkeypatch.setattr(
            "callbacks.explanation.evaluate.source_digest", lambda kind: source if kind is Own else None
        )
        run(tmp_path, EvaluationCallback(["own", "pid16"], explainers={"random": None}, baselines=False, **STEP))
        return {row["value"] for row in rows(tmp_path / "test") if row["metric"] == "own"}

    assert scores("before") == {"1.0"}
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert scores("before") == {"1.0"}
    assert scores("after") == {"2.0"}
    manifest = json.loads((tmp_path / "test" / "maps" / "manifest.json").read_text())
    assert manifest["sources"]["own"] == "after"


def test_keys_of_own_metrics_depend_on_their_settings_alone(tmp_path):
    score = EvaluationCallback(["pid16", "mass"], explainers={"random": None}, baselines=False, **STEP)
    run(tmp_path, score)
    assert score.keys == KEYS


KEYS = {"pid16": "df3999b8611b", "mass": "5baaca4e94bb"}


def test_predictions_are_written_without_metrics(tmp_path):
    explain, score = ExplanationCallback({"random": None}, val_images=4), EvaluationCallback(["pid16"], val_metrics=[])
    trainer(tmp_path, explain, score, MapLogger(), ReportCallback(), max_epochs=1).fit(network(), data())
    stage = tmp_path / "val" / "epoch=000"
    assert [row["index"] for row in rows(stage, "predictions.csv")] == ["0", "2", "3", "5"]
    assert rows(stage) == []


def test_images_excluded_by_a_batch_limit_cause_a_warning(tmp_path):
    explain = ExplanationCallback({"random": None}, val_images=4)
    with pytest.warns(UserWarning, match=r"epoch=000: 2 of the 4 images chosen .* reached; trainer\.limit_val_batches"):
        trainer(tmp_path, explain, max_epochs=1, limit_val_batches=0.5).fit(network(), data())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*images chosen")
        run(tmp_path, ExplanationCallback({"random": None}, test_images=3))


def test_a_network_with_one_logit_raises(tmp_path, monkeypatch):
    module, single = network(), data()
    forward = type(module.network).forward

    def first_logit(self, *given):
        output = forward(self, *given)
        return replace(output, logits=output.logits[:, :1])

    batch = {"image": torch.rand(2, 3, 48, 48), "label": torch.tensor([0, 0]), "index": torch.arange(2)}
    monkeypatch.setattr(type(module.network), "forward", first_logit)
    score = EvaluationCallback(["pid16"], explainers={"random": None}, baselines=False, **STEP)
    monkeypatch.setattr(type(module), "test_step", lambda *_: None)
    monkeypatch.setattr(type(module), "on_test_epoch_end", lambda *_: None)
    monkeypatch.setattr(type(single), "test_dataloader", lambda self: DataLoader([batch], batch_size=None))
    with pytest.raises(ValueError, match=r"one logit, whose softmax is 1 .* with probability=.sigmoid."):
        trainer(tmp_path, score).test(module, single, verbose=False)
