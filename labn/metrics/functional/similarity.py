"""How alike two maps order the pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def midranks(values: Tensor) -> Tensor:
    """Ranks 1..P of (B, P) in ascending order, tied values sharing their mean rank; float64."""
    ordered = values.sort(1).values
    below, not_above = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of the pixels of two maps: the correlation of their midranks (Spearman 1904).

    Args:
        first: (B, H, W).
        second: (B, H, W).

    Returns:
        (B,) float64 in [-1, 1]. Where a map is constant the coefficient has no value: 1 if both are, else 0. NaN where
        a map holds a value that is not finite.
    """
    if first.shape != second.shape:
        raise ValueError(f"the maps must have one size, got {tuple(first.shape)} and {tuple(second.shape)}.")
    flat = [maps.double().flatten(1).contiguous() for maps in (first, second)]
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in map(midranks, flat))
    a_square, b_square = a.square().sum(1), b.square().sum(1)
    scale = (a_square * b_square).sqrt()
    both_constant = (a_square + b_square == 0).double()
    value = torch.where(scale > 0, (a * b).sum(1) / torch.where(scale > 0, scale, 1), both_constant)
    finite = torch.stack([maps.isfinite().all(1) for maps in flat]).all(0)
    return torch.where(finite, value.clamp(-1, 1), torch.nan)
