"""What surrounds every forward of an explanation or a score."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from labn.inference.hooks import recording_calls
from labn.inference.modes import evaluating, full_precision

cudnn, mkldnn, matmul = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul


def settings() -> tuple[str, ...]:
    """What single precision means to convolutions, recurrent layers and matrix products on GPU and CPU."""
    operations = (cudnn.conv, cudnn.rnn, matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)
    return tuple(operation.fp32_precision for operation in operations)


@pytest.fixture(autouse=True)
def _restored():
    yield
    for place in (torch.backends, cudnn, mkldnn, mkldnn.conv, mkldnn.rnn):
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_explanations_use_full_precision_whatever_training_allows(precision: str, allowed: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32 = allowed
    before = settings()
    with evaluating(nn.Identity()):
        assert not {"tf32", "bf16"} & {*settings()}
        assert not cudnn.allow_tf32
    assert settings() == before
    assert cudnn.allow_tf32 is allowed
    assert torch.get_float32_matmul_precision() == precision


def test_settings_of_the_newer_interface_are_restored_too() -> None:
    cudnn.conv.fp32_precision = "ieee"
    cudnn.rnn.fp32_precision = "tf32"
    with full_precision():
        assert cudnn.conv.fp32_precision == "ieee"
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")


@pytest.mark.parametrize(
    ("place", "precision"),
    [(torch.backends, "tf32"), (cudnn, "tf32"), (matmul, "tf32"), (mkldnn, "bf16"), (mkldnn.conv, "bf16")],
    ids=["everywhere", "gpu", "gpu's products", "cpu", "cpu's convolutions"],
)
def test_reduced_precision_of_the_newer_interface_is_switched_off(place: Any, precision: str) -> None:
    """Asking the older interface is then an error, of which a user must see nothing."""
    place.fp32_precision = precision
    before = settings()
    assert precision in before
    with full_precision():
        assert not {"tf32", "bf16"} & {*settings()}
    assert settings() == before


def test_inherited_precision_settings_stay_inherited() -> None:
    torch.backends.fp32_precision = "tf32"
    matmul.fp32_precision = "none"
    with full_precision():
        assert matmul.fp32_precision == "ieee"
    torch.backends.fp32_precision = "ieee"
    assert matmul.fp32_precision == "ieee"


def test_a_modules_own_train_method_is_not_called() -> None:
    """Such as low-rank weights, which are merged for evaluation."""

    class LowRank(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> LowRank:
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(nn.Linear(2, 2), LowRank(2, 2), nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model[1].merged
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_recording_calls_detects_a_copy_that_runs_its_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    clean, x = copy.deepcopy(model), torch.zeros(1, 2)
    forward = model.forward
    model.forward = lambda x: forward(x)
    bound = copy.deepcopy(model)
    with recording_calls(model) as heard:
        clean(x)
        assert not heard
        bound(x)
    assert heard == [model[0], model[1]]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_restores_the_training_flags() -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert settings() == before
