"""What is known when a command begins: metrics that the data does not fit are refused before anything is trained."""

import pytest
import torch
from test_callbacks import data, network, trainer

from callbacks import EvaluationCallback
from datamodules import SyntheticFundus

NO_MASKS = r"metric 'mass', which compares with ground truth, but the {} split of SyntheticFundus has no masks"
OFFICIAL = r"'pid16@official', which does not fit data\.init_args\.image_size 56: .*square images divisible by 16, got"
LARGE = r"'pid64', which does not fit data\.init_args\.image_size 48: patch_size must be from 1 to 48"


def scoring(*metrics, **options):
    return EvaluationCallback(list(metrics), explainers={"random": None}, baselines=False, **options)


@pytest.fixture
def maskless(monkeypatch):
    monkeypatch.setattr(SyntheticFundus, "has_masks", lambda self, split: False)


@pytest.mark.parametrize(
    ("callback", "size", "sentence"),
    [
        (scoring("pid16", also=["official"], every_n_epochs=5), 56, OFFICIAL),
        (scoring("pid64", every_n_epochs=5), 48, LARGE),
        (
            scoring("pid16", positives_only=[2], every_n_epochs=5),
            48,
            r"positives_only is \[2\]; the data has 2 classes",
        ),
    ],
)
def test_a_metric_that_does_not_fit_the_data_raises_before_training(tmp_path, monkeypatch, callback, size, sentence):
    module = network()
    monkeypatch.setattr(module, "training_step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, callback, max_epochs=5).fit(module, data(image_size=size))


@pytest.mark.usefixtures("maskless")
@pytest.mark.parametrize("metric", ["mass", "auroc", "errors"])
def test_a_metric_without_ground_truth_raises_before_explaining(tmp_path, metric):
    sentence = NO_MASKS.replace("mass", metric)
    with pytest.raises(ValueError, match=sentence.format("test")):
        trainer(tmp_path, scoring(metric)).test(network(), data(), verbose=False)
    with pytest.raises(ValueError, match=sentence.format("val")):
        trainer(tmp_path, scoring(metric), max_epochs=1).fit(network(), data())
    assert not list(tmp_path.rglob("maps"))


@pytest.mark.usefixtures("maskless")
@pytest.mark.parametrize(
    "options", [{"val_metrics": []}, {"every_n_epochs": 0}, {"val_images": 0}, {"limit_val_batches": 0}], ids=str
)
def test_a_fit_without_scoring_does_not_check_metrics(tmp_path, options):
    limits = {name: options.pop(name) for name in ("limit_val_batches",) if name in options}
    run = trainer(tmp_path, scoring("mass", "pid64", **options), max_epochs=1, limit_train_batches=1, **limits)
    module = network()
    if limits:
        # Without the schedule, which waits for a validation.
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    run.fit(module, data())
