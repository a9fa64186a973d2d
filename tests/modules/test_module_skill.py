"""What validation and test log about the skill of forecasts."""

from types import SimpleNamespace

import pytest
import torch

from labn.modules import Classifier


def module(monkeypatch, groups):
    model = Classifier("lambda_resnet26", num_classes=4)
    data = SimpleNamespace(positive_classes=(2, 3), groups=lambda split: groups)
    model._trainer = SimpleNamespace(datamodule=data)
    logged = {}
    monkeypatch.setattr(model, "log", lambda name, value, **options: logged.update({name: float(value)}))
    return model, logged


def feed(model, stage, labels, said, groups):
    skill = model.skill[f"{stage}_"]
    logits = torch.nn.functional.one_hot(torch.tensor(said), 4).double()
    skill.update(logits, torch.tensor(labels), torch.arange(len(labels)), groups)


LABELS, SAID = [0, 1, 2, 3, 0, 2], [0, 2, 3, 1, 0, 2]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_positive_classes_come_from_the_data(stage, monkeypatch):
    model, logged = module(monkeypatch, None)
    feed(model, stage, LABELS, SAID, None)
    (model.on_validation_epoch_end if stage == "val" else model.on_test_epoch_end)()
    assert logged[f"{stage}/tss"] == pytest.approx(2 / 3 - 1 / 3)
    assert logged[f"{stage}/confusion/2_3"] == 1
    assert sum(value for name, value in logged.items() if "confusion" in name) == 6
    assert not any(name.endswith("_low") for name in logged)


def test_intervals_come_with_groups_at_test_end_only(monkeypatch):
    groups = torch.tensor([1, 1, 2, 2, 3, 3])
    model, logged = module(monkeypatch, groups)
    feed(model, "val", LABELS, SAID, groups)
    model.on_validation_epoch_end()
    assert not any(name.endswith("_low") for name in logged)
    feed(model, "test", LABELS, SAID, groups)
    model.on_test_epoch_end()
    assert logged["test/tss_low"] <= logged["test/tss"] <= logged["test/tss_high"]
    assert logged["test/brier_skill_low"] <= logged["test/brier_skill_high"]


def test_the_skill_is_reset_at_every_epoch(monkeypatch):
    model, logged = module(monkeypatch, None)
    for labels in ([0, 2], [2, 0]):
        feed(model, "val", labels, [0, 2], None)
        model.on_validation_epoch_end()
    assert logged["val/tss"] == -1.0


def test_a_skill_that_is_undefined_is_not_logged(monkeypatch):
    """Birds: every class is positive, so that there is nothing to tell apart."""
    model, logged = module(monkeypatch, None)
    model._trainer.datamodule.positive_classes = (0, 1, 2, 3)
    feed(model, "val", LABELS, SAID, None)
    model.on_validation_epoch_end()
    assert "val/tss" not in logged
    assert "val/brier_skill" in logged


def test_checkpoints_do_not_contain_the_samples_of_the_skill():
    assert not any("skill" in key for key in Classifier("lambda_resnet26").state_dict())
