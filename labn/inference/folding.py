"""BatchNorm folded into the convolutions before it, on a copy.

In eval mode BatchNorm is an affine map per channel, y = g (w * x + c - mean) / sqrt(var + eps) + b, so it goes into the
weights of the convolution before it. Which convolution that is, is seen by tracing one probe input with hooks (also
through Python control flow). What the trace cannot see (a convolution's output read twice) is checked by
`labn.inference.fast_copy`.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Pair = tuple[_ConvNd, _BatchNorm]


def hooked(module: nn.Module) -> bool:
    """Whether somebody's code runs around the module, so that it must stay as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def plain_convolution(conv: _ConvNd) -> bool:
    """Whether the module does nothing but convolve with its own weight, unobserved."""
    stock = type(conv).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return stock and not hooked(conv) and not nn.utils.parametrize.is_parametrized(conv)


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
            if output._version == version:
                self.pairs.append((conv, norm))

    def once(self) -> list[Pair]:
        """Pairs in which both modules ran exactly once."""
        return [(conv, norm) for conv, norm in self.pairs if self.calls[conv] == self.calls[norm] == 1]


def _trace(model: nn.Module, probe: Tensor) -> list[Pair]:
    trace, handles = _Trace(), []
    for module in list(model.modules()):
        if isinstance(module, _ConvNd) and plain_convolution(module):
            handles.append(module.register_forward_hook(trace.conv_hook))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None and not hooked(module):
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


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each key's value in its place, wherever the model registers it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def fold_batchnorm(model: nn.Module, probe: Tensor) -> nn.Module | None:
    """Eval-mode copy of `model` with every BatchNorm folded whose input is a convolution's output.

    Args:
        model: any module of the probe's device and dtype; not changed.
        probe: (1, C, H, W), the input that is traced.

    Returns:
        The copy, or None where there is nothing to fold.
    """
    folded = copy.deepcopy(model).eval()
    pairs = _trace(folded, probe)
    for conv, norm in pairs:
        _merge(conv, norm)
    replace_modules(folded, {norm: _replacement(norm) for _, norm in pairs})
    return folded if pairs else None
