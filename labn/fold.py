"""A prepared copy of a model for thousands of forwards: channels_last, BatchNorm folded into the convolutions.

In eval mode BatchNorm is an affine map per channel, y = g (w * x + c - mean) / sqrt(var + eps) + b, so it goes into the
weights of the convolution before it. Which convolution that is, is seen by tracing one probe input with hooks (also
through Python control flow). The copy is used only where it gives the model's probabilities on that probe.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from labn.inference import evaluating, logits_of, matching

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest difference in probability on the probe input
_PROBE_SEED = 0

Pair = tuple[_ConvNd, _BatchNorm]


@dataclass(frozen=True)
class Prepared:
    """What to run instead of a model: `copy` (None: the model itself) on images in `memory_format`."""

    copy: nn.Module | None
    memory_format: torch.memory_format

    @property
    def folded(self) -> bool:
        """Whether BatchNorm is folded."""
        return self.copy is not None


# Prepared copies by model; an entry goes with its model and is replaced when the weights have changed.
_PREPARED: WeakKeyDictionary[nn.Module, dict[bool, tuple[Hashable, Prepared]]] = WeakKeyDictionary()


def _state_key(model: nn.Module) -> Hashable:
    """Changes whenever a parameter or buffer is replaced or modified in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _foldable(conv: _ConvNd, norm: _BatchNorm) -> bool:
    """Plain convolution weights before a BatchNorm with running statistics."""
    plain = type(conv).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    plain = plain and not conv._forward_pre_hooks and not nn.utils.parametrize.is_parametrized(conv)
    return plain and norm.running_mean is not None


class _Trace:
    """Records, during one forward, which BatchNorm reads the untouched output of which convolution."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[_ConvNd, Tensor, int]] = {}
        self.pairs: list[Pair] = []
        self.calls: Counter[nn.Module] = Counter()

    def conv_hook(self, conv: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls[conv] += 1
        assert isinstance(conv, _ConvNd)
        self.outputs[id(output)] = (conv, output, output._version)

    def norm_hook(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls[norm] += 1
        assert isinstance(norm, _BatchNorm)
        if inputs and id(inputs[0]) in self.outputs:
            conv, output, version = self.outputs[id(inputs[0])]
            if output._version == version and _foldable(conv, norm):
                self.pairs.append((conv, norm))

    def once(self) -> list[Pair]:
        """Pairs in which both modules ran exactly once."""
        return [(conv, norm) for conv, norm in self.pairs if self.calls[conv] == self.calls[norm] == 1]


def _trace(model: nn.Module, probe: Tensor) -> list[Pair]:
    trace, handles = _Trace(), []
    for module in model.modules():
        if isinstance(module, _ConvNd):
            handles.append(module.register_forward_hook(trace.conv_hook))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(trace.norm_hook))
    try:
        model(probe)
    finally:
        for handle in handles:
            handle.remove()
    return trace.once()


def _merge(conv: _ConvNd, norm: _BatchNorm) -> None:
    """Put the BatchNorm into the convolution's weights; computed in float64, stored in the weights' dtype."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    scale = gain / torch.sqrt(var + norm.eps)
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype))
    conv.bias = nn.Parameter((shift + (bias - mean) * scale).to(conv.weight.dtype))


def _replacement(norm: nn.Module) -> nn.Module:
    """What stays of a BatchNorm: nothing, or the dropout and activation that timm's `BatchNormAct2d` holds."""
    rest = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*rest).eval() if rest else nn.Identity()


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def fold_batchnorm(model: nn.Module, probe: Tensor) -> nn.Module | None:
    """Eval-mode copy of `model` with every BatchNorm folded whose input is a convolution's output.

    Args:
        model: any module; not changed.
        probe: (1, C, H, W), the input that is traced.

    Returns:
        The copy in the probe's device and dtype, or None where there is nothing to fold.
    """
    folded = copy.deepcopy(model).to(probe.device, probe.dtype).eval()
    pairs = _trace(folded, probe)
    for conv, norm in pairs:
        _merge(conv, norm)
    _replace(folded, {norm: _replacement(norm) for _, norm in pairs})
    return folded if pairs else None


def _agrees(module: nn.Module, probe: Tensor, expected: Tensor) -> bool:
    """Whether `module` gives the expected probabilities on the probe; a model that cannot run there does not."""
    try:
        probabilities = logits_of(module(probe)).softmax(-1)
    except (RuntimeError, ValueError):
        return False
    return bool(((probabilities - expected).abs() <= TOLERANCE).all())


def _candidates(model: nn.Module, probe: Tensor, fold: bool) -> Iterator[Prepared]:
    """The fastest form first; the last one always holds."""
    if fold:
        try:
            folded = fold_batchnorm(model, probe)
        except (RuntimeError, TypeError, AttributeError) as error:
            folded = None
            log.warning("%s could not be copied for folding (%s); it runs as it is.", type(model).__name__, error)
        if folded is not None:
            yield Prepared(folded.to(memory_format=torch.channels_last), torch.channels_last)
            log.warning("Folding BatchNorm changes the probabilities of %s; it runs unfolded.", type(model).__name__)
    yield Prepared(None, torch.channels_last)
    log.info("%s does not run in channels_last; it runs in the default memory format.", type(model).__name__)


def _choose(model: nn.Module, images: Tensor, fold: bool) -> Prepared:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    probe = torch.randn(1, *images.shape[1:], generator=generator, dtype=torch.float64).to(images)
    plain = matching(model, images)
    with torch.inference_mode(False), torch.no_grad(), evaluating(plain, images.device.type):
        expected = logits_of(plain(probe)).softmax(-1)
        last = probe.contiguous(memory_format=torch.channels_last)
        for candidate in _candidates(plain, probe, fold):
            if _agrees(candidate.copy or plain, last, expected):
                return candidate
    return Prepared(None, torch.contiguous_format)


def prepare(model: nn.Module, images: Tensor, *, fold: bool = True) -> Prepared:
    """The fastest form of `model` that gives its probabilities to 1e-4 on one seeded probe input.

    The choice depends on the weights and on the images' shape, device and dtype, never on their content, so every rank
    chooses alike. It is made once per model and again after its weights have changed.

    Args:
        model: any module that returns logits or an object with `.logits`.
        images: (B, C, H, W), for shape, device and dtype.
        fold: whether a copy with BatchNorm folded may be used.
    """
    key = (_state_key(model), images.shape[1:], images.device, images.dtype)
    entries = _PREPARED.setdefault(model, {})
    if fold not in entries or entries[fold][0] != key:
        entries[fold] = (key, _choose(model, images, fold))
    return entries[fold][1]
