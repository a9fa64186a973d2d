"""Resampled sums of many columns at once, as one product of draw counts and columns, exact in any order of addition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CELLS = 1 << 22  # counts in memory at once (32 MiB)
_MANTISSA = 52  # float64 holds every integer up to 2^53; one bit is left for the rounding of the largest value


def group_sums(columns: Tensor, groups: Tensor | None) -> Tensor:
    """Sums (G, F) of the columns (n, F) over each of G groups; without groups every sample is a group of its own.

    Example:
        >>> group_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([7, 3, 7])).tolist()
        [[2.0], [5.0]]
    """
    if groups is None or len(columns) == 0:
        return columns
    _, number = groups.unique(return_inverse=True)
    return columns.new_zeros(int(number.max()) + 1, columns.shape[1]).index_add(0, number, columns)


def resampled_sums(sums: Tensor, n_resamples: int, seed: int) -> Tensor:
    """Sums over resamples of units drawn with replacement: how often each unit is drawn, times the sums of the units.

    All columns share the draws, which depend on the number of units and the seed alone. The values are rounded to fixed
    point (relative to the largest of their column, 2^-36 for 50 000 units and 2^-44 for 200), so that every sum is an
    integer that float64 holds exactly: the digits depend on neither the size of the blocks nor the number of threads.

    Args:
        sums: (G, F) float64, the sums of each unit (sample or group).
        n_resamples: R, number of resamples of G units each.
        seed: seed of the generator.

    Returns:
        (R, F) float64; columns with NaN or infinite values are NaN.

    Example:
        >>> drawn = resampled_sums(torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64), 1000, seed=0)
        >>> sorted(set(drawn[:, 0].tolist())), set(drawn[:, 1].tolist())
        ([0.0, 1.0, 2.0], {2.0})
    """
    return resample_in_place(sums.clone(), n_resamples, seed)


def resample_in_place(sums: Tensor, n_resamples: int, seed: int) -> Tensor:
    """`resampled_sums` of a tensor that is overwritten, because many columns may take much of the memory."""
    scale = _to_fixed_point(sums)
    resampled = sums.new_empty(n_resamples, sums.shape[1])
    start = 0
    for counts in _draw_counts(len(sums), n_resamples, seed):
        torch.mm(counts, sums, out=resampled[start : start + len(counts)])
        start += len(counts)
    return resampled.mul_(scale)


def _to_fixed_point(columns: Tensor) -> Tensor:
    """Round columns (G, F) to integers of which G add up exactly; the power of two (F,) that each counts."""
    bits = _MANTISSA - (len(columns) - 1).bit_length()
    low, high = columns.aminmax(dim=0)
    largest = torch.maximum(high, -low)
    # The exponent of 0 is 0; below -900 the power of two would underflow.
    exponent = torch.frexp(largest).exponent.clamp(min=-900)
    scale = torch.ldexp(torch.ones_like(largest), exponent - bits)
    columns.div_(scale).round_().masked_fill_(~largest.isfinite(), torch.nan)
    return scale


def _draw_counts(units: int, n_resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each unit is drawn in each resample, (rows, units) float64, block by block."""
    generator = torch.Generator().manual_seed(seed)
    rows = min(max(1, _CELLS // units), n_resamples)
    for start in range(0, n_resamples, rows):
        count = min(rows, n_resamples - start)
        drawn = torch.randint(units, (count, units), generator=generator)
        drawn += units * torch.arange(count)[:, None]
        yield torch.bincount(drawn.view(-1), minlength=count * units).view(count, units).double()
