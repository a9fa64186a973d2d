"""Convolutions and fully connected layers behind one interface: rho(W), its transpose, and their prepared weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError
from labn.inference.packing import PackedKernel
from labn.lrp.tracing.recorder import Call
from labn.lrp.weight_transforms import WeightTransform


@dataclass
class Norm:
    """A BatchNorm in eval mode as y = scale * x + shift, with scale = g / sqrt(v + e) and shift = beta - m * scale.

    Attributes:
        scale, shift: (C,).
        source: addresses of the tensors that scale and shift were computed from, by which the BatchNorm is recognised.
    """

    scale: Tensor
    shift: Tensor
    source: tuple[object, ...] = ()

    @classmethod
    def of(cls, call: Call) -> Norm:
        """Read the statistics and parameters of a recorded `batch_norm`."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        arguments = {**dict(zip(names, call.args)), **call.kwargs}
        mean, variance, epsilon = arguments["running_mean"], arguments["running_var"], arguments.get("eps", 1e-5)
        gain, offset = arguments.get("weight"), arguments.get("bias")
        scale = torch.rsqrt(variance + epsilon) * (1 if gain is None else gain)
        source = tuple(None if t is None else t.data_ptr() for t in (mean, variance, gain, offset))
        return cls(scale, (0 if offset is None else offset) - mean * scale, (*source, epsilon))

    def after(self, first: Norm | None) -> Norm:
        """This BatchNorm behind another one, or behind none."""
        if first is None:
            return self
        return Norm(self.scale * first.scale, self.scale * first.shift + self.shift, (first.source, self.source))


@dataclass
class Layer:
    """A convolution or a fully connected layer, with the BatchNorm that follows it, if any.

    Attributes:
        operation: `conv1d`, `conv2d`, `conv3d` or `linear`.
        weight, bias: the layer's own tensors, detached (bias may be None).
        options: stride, padding, dilation and groups of a convolution.
        norm: the following BatchNorm; folded, the weights are w * scale and the bias is bias * scale + shift.
        memory_format: memory format of prepared 4-D weights.
        packs: whether a convolution packs its weights (see `labn.inference.packing`), for both directions.
    """

    operation: str
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    norm: Norm | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    packs: bool = False
    _prepared: dict[tuple[WeightTransform, bool], Tensor] = field(default_factory=dict, repr=False)
    _packed: dict[tuple[WeightTransform, bool, bool], PackedKernel] = field(default_factory=dict, repr=False)

    def prepared(self, transform: WeightTransform, folded: bool) -> Tensor:
        """rho(W), with BatchNorm folded in or not; computed once and kept."""
        # Folded or not is the same without a BatchNorm, and must not be prepared twice.
        key = (transform, folded and self.norm is not None)
        if key not in self._prepared:
            weight = self._transformed(*key)
            if weight is self.weight:
                return weight  # not kept: it would keep a replaced parameter alive
            self._prepared[key] = weight
        return self._prepared[key]

    def _transformed(self, transform: WeightTransform, folded: bool) -> Tensor:
        base = self.weight * self._per_output(self.norm.scale) if folded and self.norm else self.weight
        weight = transform(base)
        if weight is self.weight or weight.ndim != 4:
            return weight
        return weight.contiguous(memory_format=self.memory_format)

    def offset(self, folded: bool) -> Tensor | None:
        """The bias (out,), with the BatchNorm folded in if `folded`; None for a layer without bias."""
        if not folded or self.norm is None:
            return self.bias
        shift = self.norm.shift
        return shift if self.bias is None else self.bias * self.norm.scale + shift

    def apply(self, a: Tensor, transform: WeightTransform, folded: bool = False, bias: Tensor | None = None) -> Tensor:
        """z = rho(W) a + b for inputs a (B, in, ...), with rho(W) as in `prepared`."""
        if not self.packs:
            return getattr(F, self.operation)(a, self.prepared(transform, folded), bias, **self.options)
        if a.requires_grad and torch.is_grad_enabled():  # packed operators have no gradient of their own
            return transposable(self, a, transform, folded, bias)
        key = (transform, folded and self.norm is not None, False)
        if key not in self._packed:
            self._packed[key] = PackedKernel(self._transformed(*key[:2]), self._geometry(), a.shape)
        return self._packed[key](a, bias)

    def adjoint(self, s: Tensor, transform: WeightTransform, folded: bool, a: Tensor) -> Tensor:
        """rho(W)^T s in the shape of the inputs a (B, in, ...), whose values are not read; s may have another B."""
        if self.packs and self._is_reversible():
            return self._packed_adjoint(transform, folded and self.norm is not None, s)(s)
        weight = self.prepared(transform, folded)
        if self.operation == "linear":
            return s @ weight
        # The transpose of a 1x1 convolution is a matrix product over the pixels, which is faster on a CPU.
        if self._is_pointwise() and s.is_contiguous(memory_format=torch.channels_last):
            return torch.matmul(s.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
        like = a
        if len(a) != len(s):
            shape = (len(s), *a.shape[1:])
            like = torch.empty(shape, dtype=s.dtype, device=s.device, memory_format=self.memory_format)
        # `convolution_backward` is the transpose for any stride, without guessing an output padding.
        padding, stride, dilation, groups = self._geometry()
        unpadded = [0] * (weight.ndim - 2)
        gradients = torch.ops.aten.convolution_backward(
            s, like, weight, None, stride, padding, dilation, False, unpadded, groups, [True, False, False]
        )
        return gradients[0]

    def _packed_adjoint(self, transform: WeightTransform, folded: bool, s: Tensor) -> PackedKernel:
        """The transpose of a convolution with stride 1: a convolution with the rotated kernel, in and out exchanged."""
        key = (transform, folded, True)
        if key not in self._packed:
            rotated = (
                self._transformed(transform, folded)
                .flip(2, 3)
                .transpose(0, 1)
                .contiguous(memory_format=self.memory_format)
            )
            rest = [k - 1 - p for k, p in zip(self.weight.shape[2:], self._geometry()[0])]
            self._packed[key] = PackedKernel(rotated, (rest, [1, 1], [1, 1], 1), s.shape)
        return self._packed[key]

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, stride and dilation per axis, and the groups."""
        padding, stride, dilation = (
            _per_axis(self.options[name], self.weight.ndim - 2) for name in ("padding", "stride", "dilation")
        )
        return padding, stride, dilation, self.options["groups"]

    def _is_reversible(self) -> bool:
        padding, stride, dilation, groups = self._geometry()
        # Padding beyond k - 1 would need a negative padding of the transpose.
        fits = all(p < k for p, k in zip(padding, self.weight.shape[2:]))
        return fits and groups == 1 and stride == dilation == [1, 1]

    def _is_pointwise(self) -> bool:
        """Whether the layer is a 1x1 convolution with stride 1 and without padding."""
        if self.operation != "conv2d" or self.weight.shape[2:] != (1, 1):
            return False
        padding, stride, _, groups = self._geometry()
        return groups == 1 and stride == [1, 1] and padding == [0, 0]

    def for_outputs(self, channels: slice) -> Layer:
        """The layer that computes these output channels only, without a BatchNorm; it shares the weight's memory."""
        bias = None if self.bias is None else self.bias[channels]
        return Layer(self.operation, self.weight[channels], bias, self.options)

    def after(self, scale: Tensor, shift: Tensor) -> Layer:
        """The layer that reads x in place of scale * x + shift, each (in,); exact without padding."""
        groups = self.options.get("groups", 1)
        # (out, in / groups, ...): the outputs of a group read the inputs of the same group.
        per_weight = (
            vector.double().view(groups, 1, -1).expand(-1, len(self.weight) // groups, -1).flatten(0, 1)
            for vector in (scale, shift)
        )
        axes = (*self.weight.shape[:2], *[1] * (self.weight.ndim - 2))
        factor, constant = (vector.reshape(axes) for vector in per_weight)
        weight = self.weight.double()
        bias = (weight * constant).flatten(1).sum(1) + (0 if self.bias is None else self.bias.double())
        dtype = self.weight.dtype
        return replace(self, weight=(weight * factor).to(dtype), bias=bias.to(dtype), _prepared={}, _packed={})

    @property
    def is_padded(self) -> bool:
        """Whether the layer pads its input."""
        return self.operation != "linear" and any(self._geometry()[0])

    @property
    def channel_axis(self) -> int:
        """The axis of the input and of the output that holds the channels."""
        return -1 if self.operation == "linear" else 1

    def per_channel(self, vector: Tensor) -> Tensor:
        """A vector (out,) in a shape that broadcasts over this layer's outputs."""
        return vector if self.operation == "linear" else vector.view(-1, *[1] * (self.weight.ndim - 2))

    def _per_output(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (self.weight.ndim - 1))


class Linear(Protocol):
    """The interface of `Layer` and `labn.lrp.rules.weighted_layer.WeightedLayer`."""

    def apply(self, a: Tensor, transform: WeightTransform, folded: bool = False, bias: Tensor | None = None) -> Tensor:
        """rho(W) a + b."""

    def adjoint(self, s: Tensor, transform: WeightTransform, folded: bool, a: Tensor) -> Tensor:
        """rho(W)^T s."""


def transposable(
    layer: Linear, a: Tensor, transform: WeightTransform, folded: bool = False, bias: Tensor | None = None
) -> Tensor:
    """`layer.apply`, with `layer.adjoint` as its gradient where autograd has no gradient or an expensive one."""
    result: Tensor = _Transposable.apply(a, bias, layer, transform, folded)
    return result


class _Transposable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, bias: Tensor | None, layer: Linear, transform: WeightTransform, folded: bool
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.choice = (layer, transform, folded)
        return layer.apply(a.detach(), transform, folded, bias)

    @staticmethod
    def backward(ctx: Any, *s: Tensor) -> tuple[Tensor | None, ...]:
        layer, transform, folded = ctx.choice
        return layer.adjoint(s[0], transform, folded, *ctx.saved_tensors), None, None, None, None


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


def layer_of(call: Call) -> Layer:
    """Read weight, bias and options of a recorded convolution or linear call."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments = {**dict(zip(names, call.args)), **call.kwargs}
    weight, bias = arguments["weight"], arguments.get("bias")
    if call.operation == "linear":
        return Layer("linear", weight, bias, {})
    options = {name: arguments.get(name, 1) for name in ("stride", "dilation", "groups")}
    options["padding"] = _explicit_padding(arguments.get("padding", 0), weight, options["dilation"])
    return Layer(call.operation, weight, bias, options)


def _explicit_padding(padding: Any, weight: Tensor, dilation: Any) -> Any:
    if padding == "valid":
        return 0
    if padding != "same":
        return padding
    # "same" pads d (k - 1) pixels in total, which is symmetric only if that is even.
    reach = [d * (k - 1) for d, k in zip(_per_axis(dilation, weight.ndim - 2), weight.shape[2:])]
    if any(r % 2 for r in reach):
        raise InputError(
            f"padding='same' with the even kernel {tuple(weight.shape[2:])} pads unevenly; give the padding as numbers."
        )
    return [r // 2 for r in reach]


def gradients(output: Tensor, leaves: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """d<s, output>/dleaf for each leaf.

    Args:
        output: (B, ...).
        leaves: tensors that the output was computed from.
        s: (T, ...), where T is B, or any number if B is 1.
    """
    if len(s) == len(output):
        return _gradients(output, leaves, s)
    # One at a time: recorded calls, such as `view(1, -1)`, may contain the batch size 1 as a constant.
    per_map = [_gradients(output, leaves, one[None]) for one in s]
    return [torch.cat(of_leaf) for of_leaf in zip(*per_map)]


def _gradients(output: Tensor, leaves: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """The gradients, with zeros for a leaf whose values were all replaced on the way to the output."""
    return list(torch.autograd.grad(output, leaves, s, retain_graph=True, materialize_grads=True, allow_unused=True))
