"""Similarity of two maps: Pearson's and Spearman's correlation of their pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from labn.errors import InputError


def midranks(values: Tensor) -> Tensor:
    """Ranks 1 to P in ascending order; tied values share the mean of their ranks.

    Args:
        values: (B, P).

    Returns:
        (B, P) float64.

    Example:
        >>> midranks(torch.tensor([[0.5, 0.1, 0.5]]))
        tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    ordered = values.sort(1).values
    # A value with b values below it and t values up to it has the ranks b + 1, ..., t, whose mean is (b + t + 1) / 2.
    below, not_above = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the pixels of two maps.

    Args:
        first: (B, H, W).
        second: (B, H, W).

    Returns:
        (B,) float64 in [-1, 1]. Pearson's coefficient is undefined for a constant map: two constant maps get 1, one
        constant map gets 0. NaN where a map holds NaN or infinity.

    Raises:
        InputError: maps of different sizes.

    Example:
        >>> correlation(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[2.0, 4.0, 6.0]]]))
        tensor([1.], dtype=torch.float64)
    """
    a, b = _flat(first, second)
    return _correlation(a, b)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of the pixels of two maps: the correlation of their midranks (Spearman 1904).

    Args:
        first: (B, H, W).
        second: (B, H, W).

    Returns:
        (B,) float64 in [-1, 1]; constant and non-finite maps as in `correlation`.

    Raises:
        InputError: maps of different sizes.

    Example:
        >>> rank_correlation(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[9.0, 4.0, 1.0]]]))
        tensor([-1.], dtype=torch.float64)
    """
    a, b = _flat(first, second)
    # Ranks of NaN would be finite numbers without a meaning.
    finite = a.isfinite().all(1) & b.isfinite().all(1)
    return torch.where(finite, _correlation(midranks(a), midranks(b)), torch.nan)


def _flat(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape:
        raise InputError(f"the maps must have one size, got {tuple(first.shape)} and {tuple(second.shape)}.")
    return first.double().flatten(1).contiguous(), second.double().flatten(1).contiguous()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation (B,) of the flattened maps (B, P) float64."""
    # The mean of a constant map may be off by one rounding; after its first value is subtracted it is exactly 0.
    a, b = (values - values[:, :1] for values in (first, second))
    a, b = (values - values.mean(1, keepdim=True) for values in (a, b))
    a_square, b_square = a.square().sum(1), b.square().sum(1)
    scale = (a_square * b_square).sqrt()
    # Two constant maps say the same about every pixel: 1. One constant map agrees with the other as chance does: 0.
    both_constant = (a_square + b_square == 0).double()
    value = torch.where(scale > 0, (a * b).sum(1) / torch.where(scale > 0, scale, 1), both_constant)
    return torch.where(scale.isfinite(), value.clamp(-1, 1), torch.nan)
