"""Functions that do several steps in one call, written as the steps for which relevance propagation has rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V, the definition of `F.scaled_dot_product_attention`, without dropout.

    Args:
        query: (..., L, E); key: (..., S, E); value: (..., S, Ev).
        attn_mask: bool (True: may be attended to) or additive, broadcastable to (..., L, S).
        dropout_p: not used; a network is explained in eval mode.
        is_causal: position l attends to positions up to l.
        scale: None: 1 / sqrt(E).
        enable_gqa: several query heads share one key and value head.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf) if masked else scores + attn_mask
    return scores.softmax(-1) @ value


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, _width: int, heads: int, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """`F.multi_head_attention_forward` for (L, B, E) queries: three projections, attention, and a projection."""
    options = {**dict(zip(_MULTI_HEAD, args)), **kwargs}
    weights, biases = _projections(options)
    projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in projected)  # (B, heads, L, E / heads)
    mixed = attention(q, k, v, _mask(options, heads)).permute(2, 0, 1, 3).flatten(2)
    return F.linear(mixed, options["out_proj_weight"], options["out_proj_bias"]), None


# The arguments behind the number of heads, in order.
_MULTI_HEAD = (
    "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight",
    "out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask", "use_separate_proj_weight",
    "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v", "average_attn_weights", "is_causal",
)  # fmt: skip


def _projections(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The weights and biases of queries, keys and values."""
    bias = options["in_proj_bias"]
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    if options.get("use_separate_proj_weight"):
        return [options[f"{name}_proj_weight"] for name in "qkv"], biases
    return list(options["in_proj_weight"].chunk(3)), biases


def _mask(options: dict[str, Any], heads: int) -> Tensor | None:
    """The mask in the sense of `attention`, (L, S) or (B, heads, L, S), from PyTorch's (L, S) or (B * heads, L, S).

    PyTorch's module marks with True what must not be attended to.
    """
    mask = options.get("attn_mask")
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    return mask.logical_not() if mask is not None and mask.dtype == torch.bool else mask


def _fits_multi_head(*args: Any, **kwargs: Any) -> bool:
    """Whether a call has none of the rare options, and no reader of its attention matrix."""
    options = {**dict(zip(_MULTI_HEAD, args[5:])), **kwargs}
    rare = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
    unused = all(options.get(name) is None for name in rare) and not options.get("add_zero_attn")
    return len(args) >= 5 and args[0].ndim == 3 and unused and not options.get("need_weights", True)


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """input + value * tensor1 * tensor2."""
    product = tensor1 * tensor2
    return input + (product if value == 1 else product * value)


def scaled_add(input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """input + alpha * other."""
    return torch.add(input, torch.mul(other, alpha))


def scaled_sub(input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """input - alpha * other."""
    return torch.sub(input, torch.mul(other, alpha))


def lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """(1 - weight) * input + weight * end."""
    return input * (1 - weight) + end * weight


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a * sigmoid(b) for the two halves a and b of the input."""
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def addmm(input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * input + alpha * (first @ second)."""
    product = first @ second
    shift = input if beta == 1 else input * beta
    return shift + (product if alpha == 1 else product * alpha)


def _has_alpha(*args: Any, **kwargs: Any) -> bool:
    return set(kwargs) == {"alpha"} and len(args) == 2


def _always(*args: Any, **kwargs: Any) -> bool:
    return "out" not in kwargs


# Function -> (whether a call is written as steps, the steps).
DECOMPOSITIONS: dict[Any, tuple[Callable[..., bool], Callable[..., Any]]] = {
    F.scaled_dot_product_attention: (_always, attention),
    F.multi_head_attention_forward: (_fits_multi_head, multi_head_attention),
    F.glu: (_always, glu),
    **dict.fromkeys((torch.addcmul, Tensor.addcmul), (_always, addcmul)),
    **dict.fromkeys((torch.add, Tensor.add), (_has_alpha, scaled_add)),
    **dict.fromkeys((torch.sub, Tensor.sub), (_has_alpha, scaled_sub)),
    **dict.fromkeys((torch.lerp, Tensor.lerp), (_always, lerp)),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), (_always, addmm)),
}
