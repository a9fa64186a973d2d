"""Intervals for means over samples: seeded percentile bootstrap, plain, paired and by clusters (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
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


def _group_sums(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and count of each cluster; without clusters every sample is one."""
    if groups is None:
        return values, torch.ones_like(values)
    _, place = groups.unique(return_inverse=True)
    size = int(place.max()) + 1 if len(place) else 0
    zeros = torch.zeros(size, dtype=torch.float64)
    return zeros.index_add(0, place, values), zeros.index_add(0, place, torch.ones_like(values))


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
    means = _resampled_means(*_group_sums(values, groups), n_resamples, torch.Generator().manual_seed(seed))
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high, len(values))


def _resampled_means(sums: Tensor, counts: Tensor, n_resamples: int, generator: torch.Generator) -> Tensor:
    """Means (n_resamples,) of resampled clusters, a block of resamples at a time."""
    size, means = len(sums), []
    block = max(1, _BLOCK // size)
    for start in range(0, n_resamples, block):
        drawn = torch.randint(size, (min(block, n_resamples - start), size), generator=generator)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return torch.cat(means)


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
