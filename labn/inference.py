"""How every explainer and metric calls a model: logits out, nothing about the model changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def logits_of(output: Any) -> Tensor:
    """Logits (B, num_classes) of a model's output: the tensor itself, or the `.logits` of a dataclass.

    Raises:
        TypeError: the output is neither.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The model returned {type(output).__name__}; a tensor of logits or an object with `.logits` is needed."
        )
    return logits


def matching(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` itself where its floating tensors share the images' device and dtype, else a copy that does.

    Explanations take device and dtype from the images, so that float64 images mean float64 arithmetic and a
    bfloat16 model is explained in float32; the model passed in is never converted in place.
    """
    tensors = [*model.parameters(), *model.buffers()]
    same = all(t.device == images.device and (t.dtype == images.dtype or not t.is_floating_point()) for t in tensors)
    return model if same else copy.deepcopy(model).to(device=images.device, dtype=images.dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in IEEE single precision, whatever training allows, restoring the settings afterwards.

    cuDNN convolves in TensorFloat-32 (10 bits of mantissa) by default, and `torch.set_float32_matmul_precision` lowers
    matrix products on GPU and CPU. Both change maps and scores in the third digit, and relevance is not conserved.
    """
    matmul = torch.get_float32_matmul_precision()
    if matmul != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with _full_convolutions():
            yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)


@contextmanager
def _full_convolutions() -> Iterator[None]:
    """TensorFloat-32 off in cuDNN, by the one of PyTorch's two interfaces that is in use: mixing them is an error."""
    cudnn: Any = torch.backends.cudnn
    off: Any
    try:
        settings, name, off, before = cudnn, "allow_tf32", False, cudnn.allow_tf32
    except RuntimeError:
        settings, name, off, before = cudnn.conv, "fp32_precision", "ieee", cudnn.conv.fp32_precision
    setattr(settings, name, off)
    try:
        yield
    finally:
        setattr(settings, name, before)


@contextmanager
def evaluating(model: nn.Module, device_type: str = "cpu") -> Iterator[None]:
    """Run `model` eagerly in eval mode and full precision, restoring the train flag of every submodule afterwards.

    Hooks added after the first call of a compiled model do not fire while a gradient comes out all the same, so
    compiled code is bypassed here (`force_eager`). Gradient mode is left to the caller.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        eager = torch.compiler.set_stance("force_eager")
        with full_precision(), torch.autocast(device_type, enabled=False), eager:
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def explaining(model: nn.Module, device_type: str = "cpu") -> Iterator[None]:
    """`evaluating` with gradients on, whatever the caller's gradient mode; use `torch.autograd.grad` inside.

    `.backward()` would fill `.grad` and change the next optimiser step under gradient accumulation.
    """
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model, device_type):
        yield
