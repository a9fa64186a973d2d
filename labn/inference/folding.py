"""BatchNorm folded into the convolutions before it, on a copy.

In eval mode BatchNorm is an affine map per channel, y = g (w * x + c - mean) / sqrt(var + eps) + b, which the weights
of the convolution before it can absorb. One probe input, traced with hooks, shows which convolution feeds which
BatchNorm, also through Python control flow. The trace does not show whether something else reads the convolution's
output; `labn.inference.fast_copy` therefore compares the folded copy's logits with the model's.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from labn.inference.deep_copy import deep_copy
from labn.inference.hooks import temporary_hooks

Pair = tuple[_ConvNd, _BatchNorm]


class SplitNorms(nn.Module):
    """Base of modules in which BatchNorms read parts of the channels of one convolution's output.

    A trace sees that these inputs are new tensors, and not which channels they are.
    """

    def norm_parts(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, slice]]:
        """Convolution, BatchNorm, and the channels of the convolution's output that the BatchNorm alone reads."""
        raise NotImplementedError


def hooked(module: nn.Module) -> bool:
    """Whether forward hooks are registered on the module, whose effect a folded or packed copy would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def plain_convolution(conv: _ConvNd) -> bool:
    """Whether the module only convolves its input with its own weight: no subclass, hook or parametrisation."""
    stock = type(conv).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return stock and not hooked(conv) and not nn.utils.parametrize.is_parametrized(conv)


class _Trace:
    """Records, during one forward, which BatchNorm reads the unmodified output of which convolution."""

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
            if output._version == version:  # no in-place operation in between
                self.pairs.append((conv, norm))

    def once(self) -> list[Pair]:
        """Pairs in which both modules ran exactly once."""
        return [(conv, norm) for conv, norm in self.pairs if self.calls[conv] == self.calls[norm] == 1]


def _trace(model: nn.Module, probe: Tensor) -> list[Pair]:
    trace, modules = _Trace(), list(model.modules())
    convolutions: list[nn.Module] = [m for m in modules if isinstance(m, _ConvNd) and plain_convolution(m)]
    norms: list[nn.Module] = [m for m in modules if isinstance(m, _BatchNorm) and _fixed(m)]
    before, after = dict.fromkeys(norms, trace.norm_hook), dict.fromkeys(convolutions, trace.conv_hook)
    with temporary_hooks(before, after):
        model(probe)
    return trace.once()


def _fixed(norm: _BatchNorm) -> bool:
    """Whether the BatchNorm is a fixed affine map in eval mode that no hook reads."""
    return norm.running_mean is not None and not hooked(norm)


def _split_parts(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, slice]]:
    """The parts of all `SplitNorms` that can be folded."""
    split = [module.norm_parts() for module in model.modules() if isinstance(module, SplitNorms)]
    # A module that two of them share would be folded twice.
    users: Counter[nn.Module] = Counter()
    for parts in split:
        users.update({module for conv, norm, _ in parts for module in (conv, norm)})
    return [
        (conv, norm, rows)
        for conv, norm, rows in (part for parts in split for part in parts)
        if plain_convolution(conv) and _fixed(norm) and users[conv] == users[norm] == 1
    ]


def _merge(conv: _ConvNd, norm: _BatchNorm, rows: slice = slice(None)) -> None:
    """Multiply the BatchNorm into the weights of some output channels, in float64, and store them in their dtype."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    # y = (w x + c - mean) scale + b: the weights take the scale, the rest goes into the bias.
    scale = gain / torch.sqrt(var + norm.eps)
    weight, dtype = conv.weight.double(), conv.weight.dtype
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
    weight[rows] *= scale.view(-1, *[1] * (weight.ndim - 1))
    bias[rows] = shift + (bias[rows] - mean) * scale
    conv.weight, conv.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))


def _replacement(norm: nn.Module) -> nn.Module:
    """The module in place of a folded BatchNorm: identity, or dropout and activation of timm's `BatchNormAct2d`."""
    others = [module for name in ("drop", "act") if isinstance(module := getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*others).eval() if others else nn.Identity()


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace every key of `replacements` by its value, under every name that the model registers it by."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def fold_batchnorm(model: nn.Module, probe: Tensor) -> nn.Module | None:
    """Eval-mode copy of `model` with every BatchNorm folded whose input is a convolution's output.

    Args:
        model: any module of the probe's device and dtype; not changed.
        probe: (1, C, H, W), the input whose forward is traced.

    Returns:
        The copy, or None for a model without such a BatchNorm. Those of `SplitNorms` are folded too.
    """
    # Traced on the copy: the pairs are its own modules, and the model sees no hook.
    folded = deep_copy(model).eval()
    pairs, parts = _trace(folded, probe), _split_parts(folded)
    for conv, norm in pairs:
        _merge(conv, norm)
    for conv, norm, rows in parts:
        _merge(conv, norm, rows)
    norms = [*(norm for _, norm in pairs), *(norm for _, norm, _ in parts)]
    replace_modules(folded, {norm: _replacement(norm) for norm in norms})
    return folded if norms else None
