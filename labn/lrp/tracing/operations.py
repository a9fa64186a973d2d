"""The kind of every torch function in relevance propagation: the table to extend when a layer has no rule."""

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

# A norm over the features of one position counts as a constant factor, as CRP (IJCNN 2019) treats L2 normalisation.
CONSTANT_NORM = {"normalize", "local_response_norm"}

# Every output value is a copy of exactly one input value, so that relevance follows the gradient.
ROUTE = {
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "T", "mT", "movedim", "squeeze", "unsqueeze",
    "getitem", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "cat", "concat",
    "concatenate", "stack", "expand", "channel_shuffle", "pixel_shuffle", "roll", "flip",
    "pixel_unshuffle", "swapaxes", "swapdims", "moveaxis", "ravel", "repeat", "tile", "repeat_interleave",
    "broadcast_to", "hstack", "vstack", "dstack", "column_stack", "fliplr", "flipud", "rot90", "diagonal", "as_strided",
    "index_select", "gather", "take_along_dim", "select_scatter", "slice_scatter", "reviewed", "native_channel_shuffle",
}  # fmt: skip

# Copies that may move the leading axis.
MOVES_AXES = {"permute", "transpose", "T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "einsum"}

# Copies too, except where they fill in a value: a mask, a write into a tensor, the values of another branch.
FILL = {"masked_fill", "where", "tril", "triu", "written", "rewritten", "index_put", "scatter", "index_copy"}

# Only the shape or dtype of the second tensor is used.
SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}

MAX_POOL = {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"}

# The largest values of one tensor or of two: relevance goes to the winners, in equal shares for ties.
MAXIMUM = {"max", "amax", "maximum", "topk", "min", "amin", "minimum"}

# Linear with non-negative coefficients and without parameters: relevance is divided in proportion to contributions.
SPREAD = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean", "sum", "interpolate", "fold",
}  # fmt: skip

SUM = {"add", "iadd", "radd"}

PRODUCT = {"mul", "imul", "rmul", "multiply"}

# With a constant operand, a shift and a scaling hand relevance on unchanged.
SHIFT_OR_SCALE = SUM | PRODUCT | {"sub", "isub", "subtract", "div", "truediv", "itruediv", "divide"}

DIFFERENCE = {"sub", "isub", "subtract"}

QUOTIENT = {"div", "truediv", "itruediv", "divide"}

COMPARISON = {"eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "isfinite", "isnan"}

BOUNDED = {"sigmoid", "softmax", "hardsigmoid", "tanh"} | COMPARISON

NON_NEGATIVE = {
    "sigmoid",
    "softmax",
    "hardsigmoid",
    "relu",
    "relu6",
    "abs",
    "absolute",
    "square",
    "softplus",
    "exp",
    "exp2",
}
NON_NEGATIVE |= COMPARISON

# Functions of single values that rise from f(0) = 0, so that they keep the sign of their argument.
RISING = {
    "leaky_relu", "hardswish", "silu", "gelu", "elu", "selu", "celu", "mish", "tanh", "softsign", "erf", "atan",
    "arctan", "asinh", "arcsinh", "expm1", "log1p", "sqrt", "softshrink", "hardshrink", "tanhshrink", "prelu", "rrelu",
}  # fmt: skip

# Other functions of single values; `kind_of` evaluates them at zero.
ELEMENTWISE = RISING | {
    "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max", "threshold", "abs", "absolute", "square", "pow",
    "sin", "sinh", "tan", "arcsin", "asin", "sigmoid", "hardsigmoid", "softplus", "logsigmoid", "log_sigmoid", "exp",
    "exp2", "cos", "sign", "round", "floor", "ceil", "trunc",
}  # fmt: skip

# y = g (x - mean) / deviation + b, with mean and deviation of the same sample.
NORMALISATION = {"layer_norm", "group_norm", "instance_norm", "rms_norm"}

MATMUL = {"matmul", "rmatmul", "bmm", "mm", "mv", "einsum"}


def _reshaped(value: Tensor, *shape: Any, size: Any = None) -> Tensor:
    """`Tensor.view` by `Tensor.reshape`, for which the keyword `size` is called `shape`."""
    return value.reshape(*shape) if size is None else value.reshape(size)


# The out-of-place form in which a recorded operation is run again.
CANONICAL: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(SUM, torch.add),
    **dict.fromkeys(PRODUCT, torch.mul),
    **dict.fromkeys(DIFFERENCE, torch.sub),
    **dict.fromkeys(QUOTIENT, torch.div),
    "relu": torch.relu,
    # The graph runs in another memory layout than the model, in which a view may be impossible.
    "view": _reshaped,
    "view_as": torch.Tensor.reshape_as,
}

# Kinds that the name of the function decides; `kind_of` refines them.
_KINDS = {
    **dict.fromkeys(LINEAR, "linear"),
    **dict.fromkeys(IDENTITY, "identity"),
    **dict.fromkeys(CONSTANT_NORM, "rescale"),
    **dict.fromkeys(ROUTE, "route"),
    **dict.fromkeys(SHAPED_LIKE, "route"),
    **dict.fromkeys(MAX_POOL, "maxpool"),
    **dict.fromkeys(SPREAD, "spread"),
    **dict.fromkeys(FILL, "route"),
    **dict.fromkeys(MAXIMUM, "maximum"),
    **dict.fromkeys(NORMALISATION, "normalisation"),
    **dict.fromkeys(MATMUL, "matmul"),
    **dict.fromkeys(("softmax", "softmin"), "softmax"),
    **dict.fromkeys(("neg", "negative", "log_softmax"), "pass"),  # a change of sign; a shift by the log of the sum
    "relu": "relu",
    "batch_norm": "norm",
    # A copy too, except for the filled border.
    "pad": "pad",
    "unfold": "pad",
    "weighted": "weighted",
}


def kind_of(call: Call) -> str:
    """The kind of a recorded call, a key of `labn.lrp.backward.BACKWARD`, or `opaque`.

    `opaque` calls can be run, for example to compute a gate, but relevance cannot pass them.
    """
    name = call.operation
    if name in SHIFT_OR_SCALE or name == "rsub":
        return _arithmetic_kind(call, name)
    if name in ELEMENTWISE:
        return _elementwise_kind(call)
    kind = _KINDS.get(name, "opaque")
    if name == "interpolate" and _mode_of(call) == "bicubic":
        return "opaque"  # its coefficients have both signs
    if kind in ("linear", "norm", "maxpool") and not _is_plain(call, kind):
        return "opaque"
    if kind == "weighted" and not _is_linear(call):
        return "opaque"
    if kind in _CHECKS and not _CHECKS[kind](call):
        return "opaque"
    if name == "view" and any(isinstance(arg, torch.dtype) for arg in (*call.args, *call.kwargs.values())):
        return "opaque"  # reinterprets the bits of the memory
    return kind


def _mode_of(call: Call) -> Any:
    """The argument `mode` of a call of `interpolate`."""
    return call.args[3] if len(call.args) > 3 else call.kwargs.get("mode", "nearest")


def _arithmetic_kind(call: Call, name: str) -> str:
    varying = [isinstance(arg, Ref) for arg in call.args[:2]]
    if call.kwargs or len(call.args) != 2 or not any(varying):
        return "opaque"
    if all(varying):
        kinds = ((SUM, "sum"), (PRODUCT, "product"), (DIFFERENCE, "difference"), (QUOTIENT, "quotient"))
        return next((kind for names, kind in kinds if name in names), "opaque")
    # A constant minus a value is a shift and a change of sign.
    return "pass" if varying[0] or name in SUM | PRODUCT | DIFFERENCE | {"rsub"} else "opaque"


def _elementwise_kind(call: Call) -> str:
    """`activation` for f(0) = 0, `activation_offset` for another finite f(0); `opaque` for anything else."""
    if len(call.inputs) != 1 or not call.args or not isinstance(call.args[0], Ref):
        return "opaque"
    constants = call.constants
    like = constants[0] if constants else torch.empty(())
    zeros = torch.zeros((1, *call.shape[1:]), dtype=like.dtype, device=like.device)
    at_zero = call.evaluate({call.inputs[0]: zeros})
    if not bool(at_zero.isfinite().all()):
        return "opaque"
    return "activation_offset" if bool(at_zero.any()) else "activation"


def never_negative(call: Call) -> bool:
    """Whether a clamp or a power cannot return a negative value, by its constants."""
    given = (*call.args[1:], *call.kwargs.values())
    numbers = [value for value in given if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if call.operation in ("hardtanh", "clamp", "clip", "clamp_min"):
        lowest = call.kwargs.get("min_val", call.kwargs.get("min", call.args[1] if len(call.args) > 1 else None))
        return isinstance(lowest, (int, float)) and lowest >= 0
    return call.operation == "pow" and len(numbers) == 1 and numbers[0] % 2 == 0


def _normalises_itself(call: Call) -> bool:
    """Whether a norm takes mean and deviation from its argument, with constant gain and shift."""
    names = {"instance_norm": 5}
    own = call.operation not in names or bool(
        call.args[5] if len(call.args) > 5 else call.kwargs.get("use_input_stats", True)
    )
    return own and len(call.inputs) == 1 and isinstance(call.args[0], Ref)


def softmax_axis(call: Call) -> int:
    """The axis along which a recorded softmax adds up to one."""
    axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    return -1 if axis is None else int(axis)


def _multiplies_two(call: Call) -> bool:
    """Whether a matrix product has two tensors as its factors."""
    factors = list(call.args[1:] if call.operation == "einsum" else call.args)
    if call.operation == "einsum" and len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = list(factors[0])
    return not call.kwargs and len(factors) == 2 and all(isinstance(f, (Ref, Tensor)) for f in factors)


def _takes_values(call: Call) -> bool:
    """Whether a maximum returns values, not their positions, and compares with nothing that is computed elsewhere."""
    return call.item in (None, 0) and call.floating


_CHECKS: dict[str, Callable[[Call], bool]] = {
    "normalisation": _normalises_itself,
    "matmul": _multiplies_two,
    "maximum": _takes_values,
}


def _is_linear(call: Call) -> bool:
    """Whether the value of a `weighted` call depends on the image and is not one of the constants as well."""
    value, *rest = call.args
    constants = replace(call, args=tuple(rest)).inputs
    return isinstance(value, Ref) and value.index not in constants


def _is_plain(call: Call, kind: str) -> bool:
    """Whether the layer's parameters are constants and, for a norm, its statistics are the running ones.

    With batch statistics the output of one image would depend on the others in the batch.
    """
    if kind == "maxpool":
        return call.item in (None, 0)
    plain = len(call.inputs) == 1 and isinstance(call.args[0], Ref)
    statistics = call.args[1:3]
    training = bool(call.args[5]) if len(call.args) > 5 else bool(call.kwargs.get("training", False))
    return plain and (kind == "linear" or (not training and all(statistic is not None for statistic in statistics)))


CUTS = {"split", "split_with_sizes", "chunk", "tensor_split", "narrow", "getitem"}


def cut_of(call: Call, source: int, shape: torch.Size, axis: int) -> slice | None:
    """The consecutive channels that `call` cuts out of a value; None if it does anything else.

    The call is run on a tensor that holds the channel numbers, so that every way of cutting is understood alike.

    Args:
        call: a call that reads the value `source` and no other.
        source: index of the value.
        shape: shape of the value.
        axis: the axis of the channels.
    """
    if call.operation not in CUTS or (call.operation == "getitem" and not _is_plain_index(call.args[1])):
        return None
    numbers = torch.arange(shape[axis]).view(-1, *[1] * (len(shape) - 2 if axis == 1 else 0)).expand(shape)
    cut = call.evaluate({source: numbers})
    only_channels = cut.ndim == len(shape) and cut.numel() * shape[axis] == numbers.numel() * cut.shape[axis]
    if not only_channels or not cut.numel():
        return None
    channels = cut.movedim(axis, 0).flatten(1)[:, 0]
    first, last = int(channels[0]), int(channels[-1])
    return slice(first, last + 1) if len(channels) == last + 1 - first else None


def _is_plain_index(index: object) -> bool:
    """Whether an index consists of slices, numbers and `...` only."""
    items = index if isinstance(index, tuple) else (index,)
    return all(isinstance(item, (slice, int, type(...))) for item in items)
