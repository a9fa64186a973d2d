"""What each torch function is to relevance propagation: the one table to extend when a layer has no rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from labn.lrp.tracing.recorder import Call, Ref

LINEAR = {"conv1d", "conv2d", "conv3d", "linear"}

# The identity in eval mode, or a rearrangement that keeps shape and order.
IDENTITY = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "clone", "contiguous", "detach", "to", "float", "double", "type", "requires_grad", "identity",
}  # fmt: skip

# A norm over the features of one position is read as a constant factor (CRP's treatment of L2 normalisation).
CONSTANT_NORM = {"normalize"}

# Every output value is a copy of exactly one input value, so relevance follows the plain gradient.
ROUTE = {
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "T", "mT", "movedim", "squeeze", "unsqueeze",
    "getitem", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "cat", "concat",
    "concatenate", "stack", "expand", "channel_shuffle", "pixel_shuffle", "roll", "flip",
}  # fmt: skip

# The second tensor only lends its shape or type.
SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}

MAX_POOL = {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"}

# Linear with non-negative coefficients and without parameters: shares in proportion to the contributions.
SPREAD = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean", "sum", "interpolate",
}  # fmt: skip

SUM = {"add", "iadd", "radd"}

PRODUCT = {"mul", "imul", "rmul", "multiply"}

# With a constant operand: a shift leaves the relevance where it is, a scaling does so too.
SHIFT_OR_SCALE = SUM | PRODUCT | {"sub", "isub", "subtract", "div", "truediv", "itruediv", "divide"}

BOUNDED = {"sigmoid", "softmax", "hardsigmoid", "tanh"}

NON_NEGATIVE = {"sigmoid", "softmax", "hardsigmoid", "relu", "relu6", "abs", "square", "softplus", "exp"}


def _reshaped(value: Tensor, *shape: Any, size: Any = None) -> Tensor:
    """`Tensor.view`, which calls its argument `size` where `Tensor.reshape` has `shape`."""
    return value.reshape(*shape) if size is None else value.reshape(size)


CANONICAL: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(SUM, torch.add),
    **dict.fromkeys(PRODUCT, torch.mul),
    **dict.fromkeys(("sub", "isub", "subtract"), torch.sub),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide"), torch.div),
    "relu": torch.relu,
    # Values are replayed in other memory layouts than the model's own, in which a view may not exist.
    "view": _reshaped,
    "view_as": torch.Tensor.reshape_as,
}

_SIMPLE = {
    **dict.fromkeys(LINEAR, "linear"),
    **dict.fromkeys(IDENTITY, "identity"),
    **dict.fromkeys(CONSTANT_NORM, "rescale"),
    **dict.fromkeys(ROUTE, "route"),
    **dict.fromkeys(SHAPED_LIKE, "route"),
    **dict.fromkeys(MAX_POOL, "maxpool"),
    **dict.fromkeys(SPREAD, "spread"),
    "relu": "relu",
    "batch_norm": "norm",
    # A copy as well, but for a border that is filled in.
    "pad": "pad",
    "weighted": "weighted",
}


def kind_of(call: Call) -> str:
    """The kind of a recorded call, which says how relevance passes it: see `backward.BACKWARD`.

    `opaque` calls can be run (they may make up a gate) but relevance cannot go through them.
    """
    name = call.operation
    if name in SHIFT_OR_SCALE:
        return _arithmetic_kind(call, name)
    kind = _SIMPLE.get(name, "opaque")
    if kind in ("linear", "norm", "maxpool") and not _is_plain(call, kind):
        return "opaque"
    if kind == "weighted" and not _is_linear(call):
        return "opaque"
    if name == "view" and any(isinstance(arg, torch.dtype) for arg in (*call.args, *call.kwargs.values())):
        return "opaque"  # other bits of the same memory
    return kind


def _arithmetic_kind(call: Call, name: str) -> str:
    varying = [isinstance(arg, Ref) for arg in call.args[:2]]
    if call.kwargs or len(call.args) != 2 or not any(varying):
        return "opaque"
    if all(varying):
        return "sum" if name in SUM else "product" if name in PRODUCT else "opaque"
    return "pass" if varying[0] or name in SUM | PRODUCT else "opaque"


def _is_linear(call: Call) -> bool:
    """Whether the value of a `weighted` call varies, and is none of the constants."""
    value, *rest = call.args
    constants = replace(call, args=tuple(rest)).inputs
    return isinstance(value, Ref) and value.index not in constants


def _is_plain(call: Call, kind: str) -> bool:
    """Whether the layer's parameters are constants; batch statistics make an image depend on its neighbours."""
    if kind == "maxpool":
        return call.item in (None, 0)
    plain = len(call.inputs) == 1 and isinstance(call.args[0], Ref)
    statistics = call.args[1:3]
    training = bool(call.args[5]) if len(call.args) > 5 else bool(call.kwargs.get("training", False))
    return plain and (kind == "linear" or (not training and all(part is not None for part in statistics)))


CUTS = {"split", "split_with_sizes", "chunk", "tensor_split", "narrow", "getitem"}


def cut_of(call: Call, source: int, shape: torch.Size, axis: int) -> slice | None:
    """The run of channels that `call` cuts out of the value `source` of this shape; None if it does anything else.

    Found by letting it cut the channels' own numbers.

    Args:
        call: reads `source` and nothing else.
        source: index of the value.
        shape: of the value.
        axis: which axis has the channels.
    """
    if call.operation not in CUTS or (call.operation == "getitem" and not _is_plain_index(call.args[1])):
        return None
    numbers = torch.arange(shape[axis]).view(-1, *[1] * (len(shape) - 2 if axis == 1 else 0)).expand(shape)
    kept = call.evaluate({source: numbers})
    whole = kept.ndim == len(shape) and kept.numel() * shape[axis] == numbers.numel() * kept.shape[axis]
    if not whole or not kept.numel():
        return None
    channels = kept.movedim(axis, 0).flatten(1)[:, 0]
    first, last = int(channels[0]), int(channels[-1])
    return slice(first, last + 1) if len(channels) == last + 1 - first else None


def _is_plain_index(index: object) -> bool:
    """Whether an index is made of slices and numbers only."""
    return all(isinstance(part, (slice, int, type(...))) for part in (index if isinstance(index, tuple) else (index,)))
