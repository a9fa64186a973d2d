"""Norms over the features of a sample, whose deviation counts as a constant (Ali et al., ICML 2022).

y = g (x - mean(x)) / deviation + b is then affine in x. `identity` hands relevance on unchanged (AttnLRP, Achtibat et
al., ICML 2024); `linear` divides it by LRP-epsilon among all features under the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labn.lrp.rules.linear_layers import gradients
from labn.lrp.tracing.graph import Node
from labn.lrp.tracing.recorder import Call

# The arguments behind the input, in order.
_NAMES = {
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
    "group_norm": ("num_groups", "weight", "bias", "eps"),
    "instance_norm": ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}


def with_constant_deviation(call: Call, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A norm of x (B, ...) as an affine function of x, and its constant b in a shape that broadcasts over the result.

    Args:
        call: a recorded `layer_norm`, `rms_norm`, `group_norm` or `instance_norm`.
        x: the argument.
    """
    options = {**dict(zip(_NAMES[call.operation], call.args[1:])), **call.kwargs}
    groups, per_channel = _groups_of(call.operation, options, x)
    centred = groups if call.operation == "rms_norm" else groups - groups.mean(-1, keepdim=True)
    eps = options.get("eps")
    eps = torch.finfo(x.dtype).eps if eps is None and call.operation == "rms_norm" else 1e-5 if eps is None else eps
    deviation = (centred.detach().square().mean(-1, keepdim=True) + eps).sqrt()
    y = (centred / deviation).reshape(x.shape)
    weight, bias = (_fitted(options.get(name), x, per_channel) for name in ("weight", "bias"))
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), bias


def _groups_of(operation: str, options: dict[str, Any], x: Tensor) -> tuple[Tensor, bool]:
    """The values that share a mean along the last axis, and whether gain and shift belong to the channels (axis 1)."""
    if operation in ("layer_norm", "rms_norm"):
        return x.flatten(-len(tuple(options["normalized_shape"]))), False
    if operation == "group_norm":
        return x.reshape(len(x), options["num_groups"], -1), True
    return x.reshape(len(x), x.shape[1], -1), True


def _fitted(vector: Tensor | None, x: Tensor, per_channel: bool) -> Tensor | None:
    return vector.view(-1, *[1] * (x.ndim - 2)) if vector is not None and per_channel else vector


def shares(node: Node, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The argument x (B, ...) as a leaf, the affine norm of it with gradients, and its constant b."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y, bias = with_constant_deviation(node.call, leaf)
    return leaf, y, bias


def contributions(leaf: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """R_i = x_i sum_j (dy_j / dx_i) s_j for the affine norm y of the leaf x."""
    return leaf.detach() * gradients(y, [leaf], s)[0]
