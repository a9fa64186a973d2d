"""The position path of the lambda layer in several formulations: the same function, different speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def position_path(query: Tensor, window: Tensor, value: Tensor, formulation: str = "auto") -> Tensor:
    """y[h,v,n] = sum_k Q[h,k,n] sum_{u,m} E[k,u,m-n] V[u,v,m] (Bello, ICLR 2021, eq. 3).

    Args:
        query: Q (B, heads, dk, H, W).
        window: E (dk, du, r, r), its centre the offset 0.
        value: V (B, du, dv, H, W), zero outside of the map.
        formulation: a key of `FORMULATIONS`, or `auto`.

    Returns:
        (B, heads, dv, H, W).
    """
    return FORMULATIONS["conv2d" if formulation == "auto" else formulation](query, window, value)


def conv2d(query: Tensor, window: Tensor, value: Tensor) -> Tensor:
    """Position lambdas by one 2-D convolution with the values folded into the batch, then applied to the queries."""
    folded = value.transpose(1, 2).flatten(0, 1)
    lambdas = F.conv2d(folded, window, padding=window.shape[-1] // 2)
    lambdas = lambdas.unflatten(0, (len(value), value.shape[2]))
    return torch.einsum("bhkij,bvkij->bhvij", query, lambdas)


FORMULATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"conv2d": conv2d}
