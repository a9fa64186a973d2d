"""What surrounds every forward of an explanation or a score."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from labn.inference import evaluating, full_precision

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul


def settings() -> tuple[str, ...]:
    """What single precision means to cuDNN's convolutions and to matrix products on GPU and CPU."""
    return cudnn.conv.fp32_precision, matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_training_may_round_but_explanations_do_not(precision: str, allowed: bool) -> None:
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


def test_an_error_restores_them() -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert settings() == before
