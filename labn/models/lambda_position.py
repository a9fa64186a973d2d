"""The position path of the lambda layer in three formulations: the same function at different speed.

Measured on a CPU (r = 23, dk = 16, 4 heads) against the Conv3d form of the released code: `convolution` never loses
forward and needs a quarter to a half of its training step; `query_first` is faster still where the map is small
against the number of values. `choose` decides between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.models.lambda_convolution import convolution
from labn.models.lambda_query_first import query_first, reachable_keys

QUERY_FIRST_BELOW = 25.0


def position_path(query: Tensor, window: Tensor, value: Tensor, formulation: str = "auto") -> Tensor:
    """y[h,v,n] = sum_k Q[h,k,n] sum_{u,m} E[k,u,m-n] V[u,v,m] (Bello, ICLR 2021, eq. 3).

    Args:
        query: Q (B, heads, dk, H, W).
        window: E (dk, du, r, r), its centre the offset 0.
        value: V (B, du, dv, H, W), zero outside of the map; all three of one dtype.
        formulation: `auto` for `choose`, or a key of `FORMULATIONS`.

    Returns:
        (B, heads, dv, H, W).
    """
    name = choose(query.shape, window.shape, value.shape) if formulation == "auto" else formulation
    return FORMULATIONS[name](query, window, value)


def choose(query: torch.Size, window: torch.Size, value: torch.Size) -> str:
    """The formulation for these shapes (see `position_path`), the same on every device.

    Query first costs about heads + dk / B operations on each key that a query can reach, where the convolution's cost
    grows with dv: measured on a CPU, the two cross where the ratio of these is `QUERY_FIRST_BELOW`. While compiling,
    the convolution with a hand-written gradient gives way to plain operations, which a compiler can trace whole.
    """
    batch, heads, dim_k = query[:3]
    keys = value[1] * reachable_keys(query[-2], window[-1]) * reachable_keys(query[-1], window[-1])
    if (heads + dim_k / max(batch, 1)) * keys <= QUERY_FIRST_BELOW * value[2]:
        return "query_first"
    return "conv2d" if torch.compiler.is_compiling() else "convolution"


def conv2d(query: Tensor, window: Tensor, value: Tensor) -> Tensor:
    """By definition: lambdas by a 2-D convolution with the values folded into the batch, then applied to queries."""
    folded = value.transpose(1, 2).flatten(0, 1)
    lambdas = F.conv2d(folded, window, padding=window.shape[-1] // 2)
    lambdas = lambdas.unflatten(0, (len(value), value.shape[2]))
    return torch.einsum("bhkij,bvkij->bhvij", query, lambdas)


FORMULATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conv2d": conv2d,
    "convolution": convolution,
    "query_first": query_first,
}
