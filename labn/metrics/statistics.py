"""Means over samples with bootstrap intervals: plain, paired and by groups (Efron 1979), seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from labn.metrics.intervals import FEW, Interval, MeanTable, acceleration, bca_levels, bias, quantiles
from labn.metrics.resampling import group_sums, resample_in_place, resampled_sums

__all__ = [
    "Interval",
    "bootstrap_mean",
    "bootstrap_means",
    "bootstrap_sums",
    "paired_difference",
]

CELLS = 1 << 25
"""Cells of tables that are in memory at once (256 MiB, twice) before a new batch begins."""

Numbers = Tensor | Sequence[float]
Groups = Tensor | Sequence[int] | None
Item = TypeVar("Item")


def bootstrap_mean(
    values: Numbers,
    *,
    groups: Groups = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over samples and its bootstrap interval: BCa for few samples or groups, else percentiles.

    Args:
        values: (n,); samples with NaN are left out.
        groups: (n,) integer; samples of one group (patient, region) are drawn together.
        n_resamples: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: seed of the generator; equal input gives equal digits.

    Returns:
        The interval, see `MeanTable.bounds`; mean and bounds are NaN without samples.

    Example:
        >>> interval = bootstrap_mean([0.0, 1.0, 0.0, 1.0], n_resamples=1000)
        >>> interval.mean, interval.low, interval.high, interval.n
        (0.5, 0.0, 1.0, 4)
    """
    return next(bootstrap_means([(values, groups)], n_resamples=n_resamples, level=level, seed=seed))


def bootstrap_means(
    columns: Iterable[tuple[Numbers, Groups]], *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Iterator[Interval]:
    """`bootstrap_mean` of many columns with the same digits; columns with as many units share their random draws.

    Args:
        columns: values and groups of each column, see `bootstrap_mean`; batches of them are in memory at once.
        n_resamples: number of resamples.
        level: coverage of the intervals, in (0, 1).
        seed: seed of the generator, which starts anew for every column.

    Yields:
        One interval per column, in order.

    Example:
        >>> [interval.mean for interval in bootstrap_means([([0.0, 1.0], None), ([3.0], None)], n_resamples=10)]
        [0.5, 3.0]
    """
    tables = (mean_table(*_without_nan(values, groups)) for values, groups in columns)
    for batch in batches(tables, lambda table: table.cells):
        for table, deviations in zip(batch, shared_deviations(batch, n_resamples, seed)):
            yield from intervals(table, deviations, level)


def intervals(table: MeanTable, deviations: Tensor, level: float) -> list[Interval]:
    """The intervals of all columns of a table, from the deviations (R, K) of its resamples."""
    low, high = table.bounds(deviations, level)
    columns = (table.means, low, high, table.counts)
    return [Interval(*figures) for figures in zip(*(column.tolist() for column in columns))]


def _without_nan(values: Numbers, groups: Groups) -> tuple[Tensor, Tensor | None]:
    """Values (n, 1) that are not NaN, and their groups."""
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    present = ~values.isnan()
    return values[present, None], None if groups is None else torch.as_tensor(groups).cpu()[present]


def batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Batches of consecutive items with at most CELLS cells together; a larger item is a batch of its own."""
    batch: list[Item] = []
    count = 0
    for item in items:
        count += size(item)
        if batch and count > CELLS:
            yield batch
            batch, count = [], size(item)
        batch.append(item)
    if batch:
        yield batch


def mean_table(columns: Tensor, groups: Tensor | None = None) -> MeanTable:
    """Means of columns with the sums of their deviations over units, of which resamples are drawn.

    Args:
        columns: (n, K) float64; NaN where a sample has no value.
        groups: (n,) integer; the units are these groups, or single samples if it is None.
    """
    present = ~columns.isnan()
    means = torch.tensor([mean_of(column[there]) for column, there in zip(columns.T, present.T)], dtype=torch.float64)
    # Sums of deviations keep more digits in fixed point than sums of values far from 0.
    sums = group_sums((columns - means).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf), groups)
    kinds, size_of = masks_of(present)
    return MeanTable(means, present.sum(0), sums, group_sums(kinds.double(), groups), size_of)


def masks_of(present: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct columns (n, S) of a mask (n, K), and which of them each column equals, (K,) int64."""
    if bool(present.all()):  # the common case, without a search
        return present[:, :1], torch.zeros(present.shape[1], dtype=torch.int64)
    distinct, size_of = present.unique(dim=1, return_inverse=True)
    return distinct, size_of


def mean_of(values: Tensor) -> float:
    """Mean of values (n,), summed over samples, so that its digits do not depend on the groups."""
    # Beside a column of ones: the order of additions, and with it the last digit, is that of earlier tables.
    total, count = torch.stack([values, torch.ones_like(values)], dim=1).sum(0).tolist()
    return total / count if count else math.nan


def shared_deviations(tables: Sequence[MeanTable], n_resamples: int, seed: int) -> list[Tensor]:
    """`MeanTable.resampled` of several tables; tables with as many units share the draws and one product."""
    deviations: dict[int, Tensor] = {}
    # The draws depend on the number of units and the seed alone, so that a table has the same digits in any batch.
    for units in {len(table.sums) for table in tables}:
        same = [number for number, table in enumerate(tables) if len(table.sums) == units]
        if not units:
            deviations |= {n: tables[n].sums.new_full((n_resamples, tables[n].sums.shape[1]), math.nan) for n in same}
            continue
        columns = torch.cat([side for n in same for side in (tables[n].sums, tables[n].sizes)], dim=1)
        drawn = resample_in_place(columns, n_resamples, seed)
        widths = [tables[n].sums.shape[1] + tables[n].sizes.shape[1] for n in same]
        for number, own in zip(same, drawn.split(widths, dim=1)):
            deviations[number] = tables[number].deviations(own)
    return [deviations[number] for number in range(len(tables))]


def bootstrap_sums(
    columns: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    groups: Tensor | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A function of sums over samples (a mean, a ratio of counts) and its bootstrap interval.

    The interval is BCa at the level of Student's t (`bca_levels`) for few samples or groups, else percentiles.

    Args:
        columns: (n, F) float64, the summands of n >= 1 samples.
        statistic: sums (R, F) of R resamples -> (R,); NaN where undefined, which the interval leaves out.
        groups: (n,) integer; samples of one group are drawn together (block bootstrap with given blocks, Kuensch 1989),
            for dependent samples such as frames of one day or images of one patient.
        n_resamples: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: seed of the generator; equal input gives equal digits.

    Example:
        >>> columns = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
        >>> bootstrap_sums(columns, lambda sums: sums[:, 0] / sums[:, 1], n_resamples=1000)
        Interval(mean=1.0, low=0.5, high=1.5, n=2)
    """
    # Summed over samples and not over groups, so that the digits of the estimate do not depend on the grouping.
    total = columns.cpu().sum(0, keepdim=True)
    estimate = statistic(total)
    sums = group_sums(columns.cpu(), None if groups is None else groups.cpu())
    if len(sums) < 2:
        return Interval(float(estimate[0]), math.nan, math.nan, len(columns))
    # Resamples without both classes, for example, have no skill: they are left out and not counted as 0.
    resampled = statistic(resampled_sums(sums, n_resamples, seed))[:, None]
    levels = torch.tensor([[(1 - level) / 2, (1 + level) / 2]], dtype=torch.float64)
    if len(sums) < FEW:
        levels = _levels_of_sums(sums, total, statistic, resampled - estimate, level)
    low, high = quantiles(resampled, levels)[0].tolist()
    return Interval(float(estimate[0]), low, high, len(columns))


def _levels_of_sums(
    sums: Tensor, total: Tensor, statistic: Callable[[Tensor], Tensor], deviations: Tensor, level: float
) -> Tensor:
    """Levels (1, 2) of BCa for a statistic of sums (G, F) over units with the given total (1, F)."""
    jackknife = statistic(total - sums)[:, None]
    freedom = torch.tensor([float(len(sums))], dtype=torch.float64)
    return bca_levels(bias(deviations), acceleration(jackknife), level, freedom)


def paired_difference(
    indices_a: Tensor | Sequence[int],
    values_a: Numbers,
    indices_b: Tensor | Sequence[int],
    values_b: Numbers,
    *,
    groups: dict[int, int] | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the samples of both methods, with its bootstrap interval.

    Args:
        indices_a: (n_a,) sample indices of the first method, in any order.
        values_a: (n_a,) values of the first method; samples with NaN are left out.
        indices_b: (n_b,) sample indices of the second method, in any order.
        values_b: (n_b,) values of the second method, likewise.
        groups: sample index -> group; samples of one group are drawn together.
        n_resamples: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: seed of the generator; equal input gives equal digits.

    Example:
        >>> paired_difference([0, 1, 2], [0.5, 0.75, 1.0], [2, 1], [0.5, 0.25], n_resamples=1000)
        Interval(mean=0.5, low=0.5, high=0.5, n=2)
    """
    first = dict(zip(_integers(indices_a), torch.as_tensor(values_a, dtype=torch.float64).tolist()))
    second = dict(zip(_integers(indices_b), torch.as_tensor(values_b, dtype=torch.float64).tolist()))
    # Differences of the same samples: what makes a sample easy for both methods cancels.
    common = sorted(first.keys() & second.keys())
    differences = [first[index] - second[index] for index in common]
    clusters = None if groups is None else [groups[index] for index in common]
    return bootstrap_mean(differences, groups=clusters, n_resamples=n_resamples, level=level, seed=seed)


def _integers(indices: Tensor | Sequence[int]) -> list[int]:
    return [int(index) for index in torch.as_tensor(indices).tolist()]
