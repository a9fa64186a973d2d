"""Intervals for means over samples: seeded percentile bootstrap, plain, paired and by clusters (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 22  # drawn indices held at once


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; `n` samples went into it.

    The bounds are NaN where all of them are one sample, or one group: from one there is nothing to draw.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def bracketed(self) -> str:
        """` [0.100, 0.200]`, to stand behind the mean; empty where there is no interval."""
        return "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"


def _group_sums(columns: Tensor, groups: Tensor | None) -> Tensor:
    """Sums (G, F) of the columns (n, F) over each cluster; without clusters every sample is one."""
    if groups is None or len(columns) == 0:
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
    options = {"n_resamples": n_resamples, "level": level, "seed": seed}
    return next(bootstrap_means([(values, groups)], **options))  # type: ignore[arg-type]


Numbers = Tensor | Sequence[float]
Groups = Tensor | Sequence[int] | None


def bootstrap_means(
    columns: Iterable[tuple[Numbers, Groups]], *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Iterator[Interval]:
    """`bootstrap_mean` of many columns, in order and digit for digit, where columns of one length share their draws.

    Args:
        columns: values and groups, see `bootstrap_mean`; as many of them are held at once as have 2^22 values.
        n_resamples: number of resamples.
        level: coverage of the intervals.
        seed: of the generator, which starts anew for every column.
    """
    for held in _portions(_there(values, groups) for values, groups in columns):
        tables = [torch.stack([values, torch.ones_like(values)], dim=1) for values, _ in held]
        sums = [_group_sums(table, groups) for table, (_, groups) in zip(tables, held)]
        resampled: dict[int, Tensor] = {}
        for size in {len(own) for own in sums} - {0}:
            same = [place for place, own in enumerate(sums) if len(own) == size]
            drawn = _resampled_sums([sums[n] for n in same], n_resamples, torch.Generator().manual_seed(seed))
            resampled |= zip(same, drawn)
        for place, table in enumerate(tables):
            nothing = Interval(torch.nan, torch.nan, torch.nan, 0)
            clusters = len(sums[place])
            yield _interval(table, _mean, resampled[place], level, clusters) if clusters else nothing


def _there(values: Numbers, groups: Groups) -> tuple[Tensor, Tensor | None]:
    """Values that are not NaN, and their groups."""
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    there = ~values.isnan()
    return values[there], None if groups is None else torch.as_tensor(groups).cpu()[there]


def _portions(columns: Iterator[tuple[Tensor, Tensor | None]]) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """Consecutive columns, of at most _BLOCK values together where there is more than one."""
    held: list[tuple[Tensor, Tensor | None]] = []
    count = 0
    for column in columns:
        count += len(column[0])
        if held and count > _BLOCK:
            yield held
            held, count = [], len(column[0])
        held.append(column)
    if held:
        yield held


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
    (resampled,) = _resampled_sums([sums], n_resamples, torch.Generator().manual_seed(seed))
    return _interval(columns.cpu(), statistic, resampled, level, len(sums))


def _interval(
    columns: Tensor, statistic: Callable[[Tensor], Tensor], resampled: Tensor, level: float, clusters: int
) -> Interval:
    """The statistic of (n, F) columns, between percentiles of that of resampled sums (R, F), NaN left out."""
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(statistic(resampled), bounds).tolist() if clusters > 1 else (math.nan, math.nan)
    # The mean over samples themselves, not over sums of groups: the digits then do not depend on the grouping.
    return Interval(float(statistic(columns.sum(0, keepdim=True))[0]), low, high, len(columns))


def _resampled_sums(tables: Sequence[Tensor], n_resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Per table (G, F) the sums (n_resamples, F) of resampled clusters, the same for all; some resamples at once."""
    size = len(tables[0])
    block = min(max(1, _BLOCK // size), n_resamples)
    resampled = [table.new_empty(n_resamples, table.shape[1]) for table in tables]
    # Memory that is allocated anew for every column would take most of the time.
    drawn, gathered = torch.empty(block, size, dtype=torch.int64), torch.empty(block * size, dtype=torch.float64)
    for start in range(0, n_resamples, block):
        count = min(block, n_resamples - start)
        torch.randint(size, (count, size), generator=generator, out=drawn[:count])
        for table, sums in zip(tables, resampled):
            for place, column in enumerate(table.unbind(1)):
                # Where every cluster is one sample, counts add up to the same number in every resample, exactly.
                if bool((column == 1).all()):
                    sums[start : start + count, place] = float(size)
                    continue
                out = gathered[: count * size]
                torch.index_select(column, 0, drawn[:count].view(-1), out=out)
                sums[start : start + count, place] = out.view(count, size).sum(1)
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
