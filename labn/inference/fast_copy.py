"""The fastest form of a model for thousands of forwards: channels_last, folded and packed, where the logits agree."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from labn.inference.chunk_size import cpu_chunk
from labn.inference.deep_copy import deep_copy, leads_to
from labn.inference.fingerprint import ModelCache, note_written
from labn.inference.folding import fold_batchnorm
from labn.inference.hooks import recording_calls
from labn.inference.model_traits import repeat_each_other
from labn.inference.modes import evaluating, matching, run_model, to_channels_last
from labn.inference.packing import can_pack, pack_convolutions

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest difference in probability, and in logits relative to the largest, on the probe input

_PROBE_SEED = 0


@dataclass(frozen=True)
class FastForm:
    """How a model is run.

    Attributes:
        memory_format: of the inputs.
        copied: a copy runs in place of the model itself.
        folded: BatchNorm is folded into the convolutions of the copy.
        packed: the convolutions of the copy are `labn.inference.packing.PackedConv2d`.
    """

    memory_format: torch.memory_format = torch.contiguous_format
    copied: bool = False
    folded: bool = False
    packed: bool = False


@dataclass(frozen=True)
class FastCopy:
    """A model that is ready for many forwards.

    Attributes:
        form: how it is run.
        copy: the module that runs; None: the model itself. `runnable_copy` fills it in.
    """

    form: FastForm
    copy: nn.Module | None = None


_copies: ModelCache[FastCopy] = ModelCache()


def _forms(model: nn.Module, probe: Tensor, fold: bool) -> Iterator[FastForm]:
    """The forms to try, the fastest first; the last one is the model as it is, which always works."""
    last, packs = torch.channels_last, can_pack(probe, torch.float32)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        for folded in (True, False) if fold else (False,):
            for packed in (True, False) if packs else (False,):
                yield FastForm(last, True, folded, packed)
    yield FastForm(last)
    yield FastForm()


def _build(model: nn.Module, probe: Tensor, form: FastForm, dtype: torch.dtype) -> nn.Module | None:
    """The model's copy in this form; None where the form does not apply."""
    if not form.copied:
        return model
    probe = probe.clone()  # folding and packing run the model, which may write on its input
    copied = fold_batchnorm(model, probe) if form.folded else deep_copy(model).eval()
    if copied is not None:
        to_channels_last(copied)
        if form.packed:
            pack_convolutions(copied, probe, cpu_chunk(probe), dtype)
    return copied


def _try(model: nn.Module, probe: Tensor, form: FastForm, expected: Tensor) -> FastCopy | None:
    """The copy in this form if it gives the expected logits on the probe, else None."""
    name = type(model).__name__
    try:
        built = _build(model, probe, form, probe.dtype)
        if built is None:
            return None
        if form.copied and leads_to(built, model):
            log.info("A copy of %s holds the original, so the model is run without a copy.", name)
            return None
        with recording_calls(model) as called:
            logits = run_model(built, probe, form.memory_format)
    except Exception as error:  # a user's model may fail in any way when it is copied; it still runs as it is
        log.info("%s does not run as %s (%s).", name, form, error)
        return None
    if form.copied and called:
        log.info("A copy of %s runs layers of the original, so the model is run without a copy.", name)
        return None
    difference = _difference(logits, expected)
    if difference <= TOLERANCE:
        return FastCopy(form, built if form.copied else None)
    log.warning("%s: %s changes the answer by %.1e, so another form is taken.", name, form, difference)
    return None


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The larger of two differences: in probability, and in logits relative to the largest logit.

    A saturated softmax hides a difference in logits, and a single logit has the probability 1 whatever its value.
    """
    probability = (logits.softmax(-1) - expected.softmax(-1)).abs().max().item()
    largest = (logits - expected).abs().max().item()
    return max(probability, largest / max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny))


def _choose(model: nn.Module, probe: Tensor, fold: bool) -> FastCopy:
    expected = run_model(model, probe)
    note_written(model)
    # No form can be compared with a model whose own answers differ.
    if not repeat_each_other(expected, run_model(model, probe)):
        return FastCopy(FastForm())
    for form in _forms(model, probe, fold):
        prepared = _try(model, probe, form, expected)
        if prepared is not None:
            return prepared
    return FastCopy(FastForm())


def _prepare(model: nn.Module, images: Tensor, fold: bool, dtype: torch.dtype) -> FastCopy:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    probe = torch.randn(1, *images.shape[1:], generator=generator, dtype=torch.float64).to(images)
    # The form is always chosen in the images' dtype: reduced precision alone would exceed the tolerance.
    exact = fast_copy(model, images, fold=fold) if dtype != images.dtype else None
    with torch.inference_mode(False), torch.no_grad():
        plain = matching(model, images)
        with evaluating(plain, images.device.type):
            if exact is None:
                return _choose(plain, probe, fold)
            if not exact.form.packed or not can_pack(probe, dtype):
                return exact
            return FastCopy(exact.form, _build(plain, probe, exact.form, dtype))


def fast_copy(model: nn.Module, images: Tensor, *, fold: bool = True, dtype: torch.dtype | None = None) -> FastCopy:
    """The fastest form of `model` that gives its probabilities and logits to 1e-4 on one seeded probe input.

    The choice depends on the machine, the weights and the images' shape, device and dtype, never on their content, so
    that every rank chooses alike. It is made once per model, and again after weights, modules, hooks or attributes have
    changed (see `labn.inference.fingerprint`).

    Args:
        model: any module that returns logits or an object with `.logits`; not changed.
        images: (B, C, H, W), for shape, device and dtype.
        fold: whether BatchNorm may be folded.
        dtype: dtype in which convolutions are packed; None: the images'.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> fast_copy(model, torch.zeros(1, 3, 8, 8)).form.folded
        True
    """
    dtype = dtype or images.dtype
    kind = (images.shape[1:], images.device, images.dtype)
    return _copies.get(model, (fold, dtype), lambda: _prepare(model, images, fold, dtype), valid_for=kind)


def runnable_copy(model: nn.Module, images: Tensor, *, fold: bool = True, dtype: torch.dtype | None = None) -> FastCopy:
    """`fast_copy` whose `copy` is never None: the model itself, in the images' dtype, where no copy is faster."""
    prepared = fast_copy(model, images, fold=fold, dtype=dtype)
    # `is None`: a compiled module has no truth value. The model does not go into the cache, which would keep it alive.
    return replace(prepared, copy=matching(model, images)) if prepared.copy is None else prepared
