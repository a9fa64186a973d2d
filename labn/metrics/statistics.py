"""Percentile bootstrap intervals of means over samples: plain, paired and by clusters (Efron 1979), seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 22  # drawn indices in memory at once (32 MiB)


@dataclass(frozen=True)
class Interval:
    """Mean over `n` samples with the bounds of its interval.

    The bounds are NaN for a single sample or a single group, whose resamples are all the same.

    Attributes:
        mean: mean over the samples.
        low: lower bound.
        high: upper bound.
        n: number of samples.

    Example:
        >>> Interval(mean=0.5, low=0.25, high=0.75, n=20).bracketed
        ' [0.250, 0.750]'
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def bracketed(self) -> str:
        """The bounds as ` [0.100, 0.200]`, to print behind the mean; an empty string where they are NaN."""
        return "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"


def _group_sums(columns: Tensor, groups: Tensor | None) -> Tensor:
    """Sums (G, F) of the columns (n, F) over each of G groups; without groups every sample is a group of its own."""
    if groups is None or len(columns) == 0:
        return columns
    _, number = groups.unique(return_inverse=True)
    return columns.new_zeros(int(number.max()) + 1, columns.shape[1]).index_add(0, number, columns)


def bootstrap_mean(
    values: Tensor | Sequence[float],
    *,
    groups: Tensor | Sequence[int] | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over samples and its percentile bootstrap interval.

    Args:
        values: (n,); samples with NaN are left out.
        groups: (n,) integer; samples of one group (patient, region) are drawn together.
        n_resamples: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: seed of the generator; equal input gives equal digits.

    Returns:
        The interval; mean and bounds are NaN without samples.

    Example:
        >>> interval = bootstrap_mean([0.0, 1.0, 0.0, 1.0], n_resamples=1000)
        >>> interval.mean, interval.low, interval.high, interval.n
        (0.5, 0.0, 1.0, 4)
    """
    options = {"n_resamples": n_resamples, "level": level, "seed": seed}
    return next(bootstrap_means([(values, groups)], **options))  # type: ignore[arg-type]


Numbers = Tensor | Sequence[float]
Groups = Tensor | Sequence[int] | None


def bootstrap_means(
    columns: Iterable[tuple[Numbers, Groups]], *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Iterator[Interval]:
    """`bootstrap_mean` of many columns with the same digits; columns of equal length share their random draws.

    Args:
        columns: values and groups of each column, see `bootstrap_mean`; at most 2^22 values are in memory at once.
        n_resamples: number of resamples.
        level: coverage of the intervals, in (0, 1).
        seed: seed of the generator, which starts anew for every column.

    Yields:
        One interval per column, in order.

    Example:
        >>> [interval.mean for interval in bootstrap_means([([0.0, 1.0], None), ([3.0], None)], n_resamples=10)]
        [0.5, 3.0]
    """
    for batch in _batches(_without_nan(values, groups) for values, groups in columns):
        # A mean is a ratio of two sums, of the values and of ones: groups of unequal size then weigh right.
        tables = [torch.stack([values, torch.ones_like(values)], dim=1) for values, _ in batch]
        sums = [_group_sums(table, groups) for table, (_, groups) in zip(tables, batch)]
        resampled: dict[int, Tensor] = {}
        # The draws depend on the number of groups and the seed alone, so columns of one length can share them.
        for size in {len(group_sums) for group_sums in sums} - {0}:
            same = [number for number, group_sums in enumerate(sums) if len(group_sums) == size]
            drawn = _resampled_sums([sums[n] for n in same], n_resamples, torch.Generator().manual_seed(seed))
            resampled |= zip(same, drawn)
        for number, table in enumerate(tables):
            empty = Interval(torch.nan, torch.nan, torch.nan, 0)
            clusters = len(sums[number])
            yield _interval(table, _mean, resampled[number], level, clusters) if clusters else empty


def _without_nan(values: Numbers, groups: Groups) -> tuple[Tensor, Tensor | None]:
    """Values that are not NaN, and their groups."""
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    present = ~values.isnan()
    return values[present], None if groups is None else torch.as_tensor(groups).cpu()[present]


def _batches(columns: Iterator[tuple[Tensor, Tensor | None]]) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """Batches of consecutive columns with at most _BLOCK values together; a longer column is a batch of its own."""
    batch: list[tuple[Tensor, Tensor | None]] = []
    count = 0
    for column in columns:
        count += len(column[0])
        if batch and count > _BLOCK:
            yield batch
            batch, count = [], len(column[0])
        batch.append(column)
    if batch:
        yield batch


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
    """A function of sums over samples (a mean, a ratio of counts) and its percentile bootstrap interval.

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
    sums = _group_sums(columns.cpu(), None if groups is None else groups.cpu())
    (resampled,) = _resampled_sums([sums], n_resamples, torch.Generator().manual_seed(seed))
    return _interval(columns.cpu(), statistic, resampled, level, len(sums))


def _interval(
    columns: Tensor, statistic: Callable[[Tensor], Tensor], resampled: Tensor, level: float, clusters: int
) -> Interval:
    """Statistic of the columns (n, F) with the percentiles of the statistic of resampled sums (R, F)."""
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    # Resamples without both classes, for example, have no skill: they are left out and not counted as 0.
    low, high = torch.nanquantile(statistic(resampled), bounds).tolist() if clusters > 1 else (math.nan, math.nan)
    # Summed over samples and not over groups, so that the digits of the mean do not depend on the grouping.
    return Interval(float(statistic(columns.sum(0, keepdim=True))[0]), low, high, len(columns))


def _resampled_sums(tables: Sequence[Tensor], n_resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Sums (n_resamples, F) of resampled groups for each table (G, F); all tables share the draws."""
    size = len(tables[0])
    block = min(max(1, _BLOCK // size), n_resamples)
    resampled = [table.new_empty(n_resamples, table.shape[1]) for table in tables]
    # Buffers for all columns and blocks: allocation for each of them would take most of the time.
    drawn, gathered = torch.empty(block, size, dtype=torch.int64), torch.empty(block * size, dtype=torch.float64)
    for start in range(0, n_resamples, block):
        count = min(block, n_resamples - start)
        torch.randint(size, (count, size), generator=generator, out=drawn[:count])
        for table, sums in zip(tables, resampled):
            for number, column in enumerate(table.unbind(1)):
                # A column of ones (counts of groups of one sample) sums to `size` in every resample, exactly.
                if bool((column == 1).all()):
                    sums[start : start + count, number] = float(size)
                    continue
                out = gathered[: count * size]
                torch.index_select(column, 0, drawn[:count].view(-1), out=out)
                sums[start : start + count, number] = out.view(count, size).sum(1)
    return resampled


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
