"""Running a model for explanation: in eval mode and full precision, without changing anything about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputTypeError
from labn.inference.deep_copy import deep_copy
from labn.inference.fingerprint import noting_written


def logits_of(output: Any) -> Tensor:
    """Logits (B, num_classes) of a model's output: the tensor itself, or the `.logits` of a dataclass.

    Raises:
        InputTypeError: the output is neither, or of another shape.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InputTypeError(
            f"The model returned {type(output).__name__}; a tensor of logits or an object with `.logits` is needed. "
            "Detectors are explained by `crp` and scored by `DetectionCallback`."
        )
    if logits.ndim == 1:
        raise InputTypeError(
            f"The model returned {tuple(logits.shape)}, one number per image; logits (B, num_classes) are needed: for "
            "a single logit (B, 1), as by output[:, None]."
        )
    if logits.ndim != 2:
        raise InputTypeError(
            f"The model returned logits of shape {tuple(logits.shape)}; (B, num_classes) is needed, as by "
            "output.flatten(1) where all further sides are 1."
        )
    return logits


def run_model(
    model: Callable[[Tensor], Any], images: Tensor, memory_format: torch.memory_format | None = None
) -> Tensor:
    """Logits of `images`, which stay as they are: a model may write on its input, so it gets a copy.

    Args:
        model: returns logits or an object with `.logits`.
        images: (B, C, H, W).
        memory_format: of the copy; None: that of the images.
    """
    return logits_of(model(images.clone(memory_format=memory_format or torch.preserve_format)))


def to_channels_last(model: nn.Module) -> None:
    """Lay out the weights of 2-D convolutions with the channels last, in place.

    `model.to(memory_format=torch.channels_last)` fails for a network that also has 3-D convolutions, whose weights have
    five axes, as timm's lambda layers do.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            # Not `contiguous`, which leaves the strides of 1x1 kernels, by which torch chooses its own kernels.
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def fast_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, num_classes), computed in channels_last, in which convolutions are faster, where the model allows it.

    A model that calls `view` on its feature maps fails in this memory format and is run again in the default one.
    """
    try:
        return run_model(model, images, torch.channels_last)
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        return run_model(model, images, torch.contiguous_format)


def matching(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` itself if its floating tensors have the images' device and dtype, else a converted copy.

    Explanations take device and dtype from the images: float64 images mean float64 arithmetic, and float32 images
    explain a bfloat16 model in float32. The model passed in is never converted in place. A model that was made under
    `torch.inference_mode()` is copied too, because no gradient passes its tensors.
    """
    tensors = [*model.parameters(), *model.buffers()]
    same = all(t.device == images.device and (t.dtype == images.dtype or not t.is_floating_point()) for t in tensors)
    if same and not any(tensor.is_inference() for tensor in tensors):
        return model
    with torch.inference_mode(False):
        return deep_copy(model).to(device=images.device, dtype=images.dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in IEEE single precision within the block, and restore torch's settings afterwards.

    cuDNN convolves in TensorFloat-32 (10 bits of mantissa) by default, and `torch.set_float32_matmul_precision` or the
    newer `fp32_precision` reduce the precision of matrix products and convolutions on GPU and CPU. Reduced precision
    changes maps and scores in the third digit, and relevance is then not conserved.
    """
    with ExitStack() as changed:
        for read, write, full in _OLDER:
            changed.enter_context(_older(read, write, full))
        backends: Any = torch.backends
        for device in (backends.cuda, backends.cudnn, backends.mkldnn):
            for settings in (getattr(device, name, None) for name in ("matmul", "conv", "rnn")):
                if getattr(settings, "fp32_precision", None) in ("tf32", "bf16"):
                    changed.enter_context(_newer(settings))
        yield


_OLDER: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda value: setattr(torch.backends.cudnn, "allow_tf32", value),
        False,
    ),
)


@contextmanager
def _older(read: Callable[[], Any], write: Callable[[Any], None], full: Any) -> Iterator[None]:
    """Change one setting of PyTorch's older interface, unless the newer one contradicts it: reading it then fails."""
    try:
        before = read()
    except RuntimeError:
        before = full
    if before != full:
        write(full)
    try:
        yield
    finally:
        if before != full:
            write(before)


@contextmanager
def _newer(settings: Any) -> Iterator[None]:
    """Set one operation of one backend to IEEE precision in the newer interface, and restore it afterwards."""
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "none"  # inherit from the backend again; enough where the value was inherited
        if settings.fp32_precision != before:
            settings.fp32_precision = before


@contextmanager
def evaluating(model: nn.Module, device_type: str = "cpu") -> Iterator[None]:
    """Run `model` eagerly in eval mode and full precision, and restore every submodule's training flag afterwards.

    The flags are set one by one, without `model.eval()`: a module may override `train` to do more than set them, such
    as merging low-rank weights, and the model must not change.

    Hooks that are added after the first call of a compiled model do not fire, although gradients still arrive, so
    compiled code is bypassed (`force_eager`). The gradient mode stays the caller's. Attributes that the model writes on
    itself during the block do not count as its settings (`labn.inference.fingerprint.noting_written`).
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        eager = torch.compiler.set_stance("force_eager")
        with full_precision(), torch.autocast(device_type, enabled=False), eager, noting_written(model):
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def explaining(model: nn.Module, device_type: str = "cpu") -> Iterator[None]:
    """`evaluating` with gradients switched on, whatever the caller's gradient mode.

    Use `torch.autograd.grad` inside: `.backward()` would fill `.grad` and change the next optimiser step under gradient
    accumulation.
    """
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model, device_type):
        yield
