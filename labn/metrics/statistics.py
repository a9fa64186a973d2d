"""Intervals for means over samples: seeded percentile bootstrap, plain, paired and by clusters (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 22  # drawn indices held at once


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; `n` samples went into it."""

    mean: float
    low: float
    high: float
    n: int


def _group_sums(columns: Tensor, groups: Tensor | None) -> Tensor:
    """Sums (G, F) of the columns (n, F) over each cluster; without clusters every sample is one."""
    if groups is None:
        return columns
    _, place = groups.unique(return_inverse=True)
    return columns.new_zeros(int(place.max()) + 1, columns.shape[1]).index_add(0, place, columns)


def bootstrap_mean(
    values: Tensor | Sequence[float],
    *,
    groups: Tensor | Sequence[int] | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over samples and its percentile interval over resamples with replacement.

    Args:
        values: (n,); NaN: the sample is left out.
        groups: (n,) integer; samples of one group (patient, region) are drawn together.
        n_resamples: number of resamples.
        level: coverage of the interval.
        seed: of the generator; equal input gives equal digits.

    Returns:
        The interval; all NaN where no sample is left.
    """
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    there = ~values.isnan()
    values = values[there]
    groups = None if groups is None else torch.as_tensor(groups).cpu()[there]
    if len(values) == 0:
        return Interval(torch.nan, torch.nan, torch.nan, 0)
    columns = torch.stack([values, torch.ones_like(values)], dim=1)
    return bootstrap_sums(columns, _mean, groups=groups, n_resamples=n_resamples, level=level, seed=seed)


def _mean(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1]


def bootstrap_sums(
    columns: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    groups: Tensor | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A function of sums over samples (a mean, a ratio of counts) and its percentile interval over resamples.

    Args:
        columns: (n, F) float64, what is summed; n is at least 1.
        statistic: sums (R, F) of R resamples -> (R,); NaN: undefined there, and left out of the interval.
        groups: (n,) integer; samples of one group are drawn together (block bootstrap, Kuensch 1989, with given
            blocks), for samples that are not independent: frames of a day, images of a patient.
        n_resamples: number of resamples.
        level: coverage of the interval.
        seed: of the generator; equal input gives equal digits.
    """
    sums = _group_sums(columns.cpu(), None if groups is None else groups.cpu())
    resampled = _resampled_sums(sums, n_resamples, torch.Generator().manual_seed(seed))
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(statistic(resampled), bounds).tolist()
    # The mean over samples themselves, not over sums of groups: the digits then do not depend on the grouping.
    return Interval(float(statistic(columns.cpu().sum(0, keepdim=True))[0]), low, high, len(columns))


def _resampled_sums(sums: Tensor, n_resamples: int, generator: torch.Generator) -> Tensor:
    """Sums (n_resamples, F) of resampled clusters, a block of resamples at a time."""
    size, resampled = len(sums), []
    block = max(1, _BLOCK // size)
    for start in range(0, n_resamples, block):
        drawn = torch.randint(size, (min(block, n_resamples - start), size), generator=generator)
        resampled.append(torch.stack([column[drawn].sum(1) for column in sums.unbind(1)], dim=1))
    return torch.cat(resampled)


def paired_difference(
    indices_a: Tensor | Sequence[int],
    values_a: Tensor | Sequence[float],
    indices_b: Tensor | Sequence[int],
    values_b: Tensor | Sequence[float],
    *,
    groups: dict[int, int] | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the samples that both have, with its bootstrap interval.

    Args:
        indices_a: (n_a,) sample indices of the first method, in any order.
        values_a: (n_a,) its values; NaN: left out.
        indices_b: (n_b,) of the second method.
        values_b: (n_b,) its values.
        groups: sample index -> cluster; see `bootstrap_mean`, also for the other arguments.
    """
    first = dict(zip(_integers(indices_a), torch.as_tensor(values_a, dtype=torch.float64).tolist()))
    second = dict(zip(_integers(indices_b), torch.as_tensor(values_b, dtype=torch.float64).tolist()))
    common = sorted(first.keys() & second.keys())
    differences = [first[index] - second[index] for index in common]
    clusters = None if groups is None else [groups[index] for index in common]
    return bootstrap_mean(differences, groups=clusters, n_resamples=n_resamples, level=level, seed=seed)


def _integers(indices: Tensor | Sequence[int]) -> list[int]:
    return [int(index) for index in torch.as_tensor(indices).tolist()]
