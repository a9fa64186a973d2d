"""The fastest form of a model for thousands of forwards: in channels_last, folded and packed, where that is exact."""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from labn.inference.fingerprint import state_key
from labn.inference.folding import fold_batchnorm
from labn.inference.hooks import recording_calls
from labn.inference.modes import evaluating, logits_of, matching
from labn.inference.packing import can_pack, pack_convolutions

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest difference in probability, and in logits relative to the largest, on the probe input

CPU_PIXELS = 4 * 224**2  # in one forward on the CPU: fewer waste calls, more outgrow the caches

CPU_CHUNK = 32  # but never more images than this

_PROBE_SEED = 0


@dataclass(frozen=True)
class FastForm:
    """How a model is run: in which memory format, on a copy or itself, with BatchNorm folded, convolutions packed."""

    memory_format: torch.memory_format = torch.contiguous_format
    copied: bool = False
    folded: bool = False
    packed: bool = False


@dataclass(frozen=True)
class FastCopy:
    """A form and its copy of the model (None: the model itself is run)."""

    form: FastForm
    copy: nn.Module | None = None


# FastCopy copies by model; an entry goes with its model and is replaced when the weights have changed.
_PREPARED: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Hashable, FastCopy]]] = WeakKeyDictionary()


def cpu_chunk(images: Tensor) -> int:
    """Batch size for many forwards of images (B, C, H, W) on the CPU: 4 at 224 pixels, 32 at 64, 1 at 512."""
    return max(1, min(CPU_CHUNK, CPU_PIXELS // (images.shape[-2] * images.shape[-1])))


def _forms(model: nn.Module, probe: Tensor, fold: bool) -> Iterator[FastForm]:
    """The fastest form first; the last one always holds."""
    last, packs = torch.channels_last, can_pack(probe, torch.float32)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        for folded in (True, False) if fold else (False,):
            for packed in (True, False) if packs else (False,):
                yield FastForm(last, True, folded, packed)
    yield FastForm(last)
    yield FastForm()


def _build(model: nn.Module, probe: Tensor, form: FastForm, dtype: torch.dtype) -> nn.Module | None:
    """The model's copy of this form; None where the form does not apply."""
    if not form.copied:
        return model
    copied = fold_batchnorm(model, probe) if form.folded else copy.deepcopy(model).eval()
    if copied is not None:
        copied = copied.to(memory_format=torch.channels_last)
        if form.packed:
            pack_convolutions(copied, probe, cpu_chunk(probe), dtype)
    return copied


def _try(model: nn.Module, probe: Tensor, form: FastForm, expected: Tensor) -> FastCopy | None:
    """The form's copy if it gives the expected logits on the probe."""
    name = type(model).__name__
    try:
        built = _build(model, probe, form, probe.dtype)
        if built is None:
            return None
        with recording_calls(model) as heard:
            found = logits_of(built(probe.contiguous(memory_format=form.memory_format)))
    except Exception as error:  # whatever a user's model does when copied or run this way, it still runs as it is
        log.info("%s does not run as %s (%s).", name, form, error)
        return None
    if form.copied and heard:
        log.info("A copy of %s runs layers of %s itself, so it is none.", name, name)
        return None
    difference = _difference(found, expected)
    if difference <= TOLERANCE:
        return FastCopy(form, built if form.copied else None)
    log.warning("%s: %s changes the answer by %.1e, so another form is taken.", name, form, difference)
    return None


def _difference(found: Tensor, expected: Tensor) -> float:
    """The larger of the differences in probability and in logits, which saturated or single ones show alone."""
    probability = (found.softmax(-1) - expected.softmax(-1)).abs().max().item()
    logits = (found - expected).abs().max().item()
    return max(probability, logits / max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny))


def _choose(model: nn.Module, probe: Tensor, fold: bool) -> FastCopy:
    expected = logits_of(model(probe))
    for form in _forms(model, probe, fold):
        prepared = _try(model, probe, form, expected)
        if prepared is not None:
            return prepared
    return FastCopy(FastForm())


def _prepare(model: nn.Module, images: Tensor, fold: bool, dtype: torch.dtype) -> FastCopy:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    probe = torch.randn(1, *images.shape[1:], generator=generator, dtype=torch.float64).to(images)
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
    every rank chooses alike. It is made once per model and again after its weights, modules, hooks or attributes have
    changed (see `labn.inference.fingerprint`; a change through `.data` leaves no trace).

    Args:
        model: any module that returns logits or an object with `.logits`; not changed.
        images: (B, C, H, W), for shape, device and dtype.
        fold: whether BatchNorm may be folded.
        dtype: in which convolutions are packed; None: the images'. The form is the one chosen in the images' dtype.
    """
    dtype = dtype or images.dtype
    entries, kind = _PREPARED.setdefault(model, {}), (images.shape[1:], images.device, images.dtype)
    if (fold, dtype) not in entries or entries[fold, dtype][0] != (state_key(model), kind):
        prepared = _prepare(model, images, fold, dtype)
        # The key of after: only now is known what the model's forward pass writes on it.
        entries[fold, dtype] = ((state_key(model), kind), prepared)
    return entries[fold, dtype][1]
