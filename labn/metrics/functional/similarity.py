"""How alike two maps are."""

from __future__ import annotations

import torch
from torch import Tensor

from labn.errors import InputError


def midranks(values: Tensor) -> Tensor:
    """Ranks 1..P of (B, P) in ascending order, tied values sharing their mean rank; float64."""
    ordered = values.sort(1).values
    below, not_above = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the pixels of two maps.

    Args:
        first: (B, H, W).
        second: (B, H, W).

    Returns:
        (B,) float64 in [-1, 1]. Where a map is constant the coefficient has no value: 1 if both are, else 0. NaN where
        a map holds a value that is not finite.

    Raises:
        ValueError: the maps differ in size.
    """
    a, b = _flat(first, second)
    return _correlation(a, b)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of the pixels of two maps: the correlation of their midranks (Spearman 1904).

    Arguments, result and errors as for `correlation`.
    """
    a, b = _flat(first, second)
    finite = a.isfinite().all(1) & b.isfinite().all(1)
    return torch.where(finite, _correlation(midranks(a), midranks(b)), torch.nan)


def _flat(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape:
        raise InputError(f"the maps must have one size, got {tuple(first.shape)} and {tuple(second.shape)}.")
    return first.double().flatten(1).contiguous(), second.double().flatten(1).contiguous()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of the rows of (B, P) float64."""
    # A constant row has a deviation of 0 from its first value, but not always from its mean.
    a, b = (values - values[:, :1] for values in (first, second))
    a, b = (values - values.mean(1, keepdim=True) for values in (a, b))
    a_square, b_square = a.square().sum(1), b.square().sum(1)
    scale = (a_square * b_square).sqrt()
    both_constant = (a_square + b_square == 0).double()
    value = torch.where(scale > 0, (a * b).sum(1) / torch.where(scale > 0, scale, 1), both_constant)
    return torch.where(scale.isfinite(), value.clamp(-1, 1), torch.nan)
