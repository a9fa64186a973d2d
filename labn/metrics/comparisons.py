"""Many methods on the same samples: intervals, differences of all pairs taken together, and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from labn.metrics.intervals import FEW, Interval, MeanTable
from labn.metrics.statistics import batches, intervals, masks_of, mean_of, mean_table, shared_deviations

_CELLS = 1 << 21  # differences of resampled means in memory at once (16 MiB)
_SAME = 1e-9  # numbers closer than this share of the larger are equal


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of a - b with its interval, and whether it may be 0.

    Attributes:
        p: p-value of the pair alone, in (0, 1]; NaN for a single sample or group.
        p_adjusted: p-value when all pairs of methods are taken together (`step_down`): among the pairs with
            p_adjusted <= .05 is a pair without any difference in about 5 % of experiments at most; with few samples
            this is approximate.

    Example:
        >>> Difference(mean=0.5, low=0.25, high=0.75, n=20, p=0.001, p_adjusted=0.06).stands
        False
    """

    p: float = math.nan
    p_adjusted: float = math.nan

    @property
    def stands(self) -> bool:
        """Whether the difference stands at the level of 5 % when all pairs are taken together."""
        return self.p_adjusted <= 0.05


@dataclass(frozen=True)
class Rank:
    """Rank of a method's mean among all methods, over the samples that all of them have.

    Attributes:
        rank: 1 is the best; tied methods share the mean of their ranks.
        low: lower percentile bound of the 95 % interval of the rank over resamples.
        high: upper bound of that interval.
        p_best: probability over resamples that the method is the best; ties for the best share it.
        n: number of samples.
    """

    rank: float
    low: float
    high: float
    p_best: float
    n: int


@dataclass(frozen=True)
class MethodComparison:
    """One value of M methods on the same samples.

    Attributes:
        intervals: mean and interval of each method; None for a method without values.
        differences: (a, b), a < b -> mean of a - b over the samples of both; without pairs that have no common sample.
        ranks: rank of each method; None for a method without values, and for all methods where the value has no better
            end or no sample is common to all.
    """

    intervals: list[Interval | None]
    differences: dict[tuple[int, int], Difference]
    ranks: list[Rank | None]


@dataclass(frozen=True)
class Value:
    """One value of M methods, to be compared.

    Attributes:
        columns: (n, M) float64; NaN where a method has no value for a sample.
        better: 1 if higher is better, -1 if lower is, 0 if neither: then there are no ranks.
        groups: (n,) int64; samples of one group are drawn together. None draws single samples.
    """

    columns: Tensor
    better: int = 0
    groups: Tensor | None = None


def compare_values(
    values: Iterable[Value], *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Iterator[MethodComparison]:
    """Compare the methods of every value; values with as many samples (or groups) share their random draws.

    The intervals of methods and differences are those of `bootstrap_mean`. Where methods lack values of different
    samples, all samples with any value are drawn, and a mean is over those of them that the method, or both methods of
    a pair, have.

    Args:
        values: the values; batches of them are in memory at once.
        n_resamples: R, number of resamples.
        level: coverage of the intervals, in (0, 1).
        seed: seed of the generator, which starts anew for every number of samples.

    Yields:
        One comparison per value, in order.

    Example:
        >>> columns = torch.tensor([[0.5, 0.25], [0.75, 0.5], [1.0, 0.75]], dtype=torch.float64)
        >>> compared = next(compare_values([Value(columns, better=1)], n_resamples=1000))
        >>> compared.differences[0, 1].mean, [rank.p_best for rank in compared.ranks]
        (0.25, [1.0, 0.0])
    """
    for batch in batches(map(_Prepared, values), lambda prepared: prepared.cells):
        tables = [table for prepared in batch for table in prepared.tables]
        deviations = iter(shared_deviations(tables, n_resamples, seed))
        for prepared in batch:
            yield prepared.compare([next(deviations) for _ in prepared.tables], level)


class _Prepared:
    """A value with the tables whose resamples its comparison needs.

    Attributes:
        better: as in `Value`.
        methods: number M of methods.
        used: numbers of the m methods with any value.
        pairs: (P, 2) pairs of them.
        apart: (P,) bool, pairs of methods that have values of different samples.
        tables: the table of means, with the differences of the pairs in `apart` behind the methods; the last table is
            that of the samples that all methods have, from which ranks come.
        means: (P,) mean differences.
    """

    def __init__(self, value: Value) -> None:
        self.better, self.methods = value.better, value.columns.shape[1]
        present = ~value.columns.isnan()
        rows, used = present.any(1), present.any(0)
        self.used: list[int] = used.nonzero()[:, 0].tolist()
        self.pairs = torch.combinations(torch.arange(len(self.used)))
        columns, groups = value.columns[rows][:, used], _chosen(value.groups, rows)
        there = ~columns.isnan()
        common = there.all(1)
        _, kinds = masks_of(there)
        self.apart = kinds[self.pairs[:, 0]] != kinds[self.pairs[:, 1]]
        differences = [columns[:, a] - columns[:, b] for a, b in self.pairs[self.apart].tolist()]
        self.tables = [mean_table(torch.cat([columns, *(d[:, None] for d in differences)], dim=1), groups)]
        if not bool(common.all()):
            self.tables.append(mean_table(columns[common], _chosen(groups, common)))
        pairs = (columns[:, a] - columns[:, b] for a, b in self.pairs.tolist())
        self.means = torch.tensor([mean_of(pair[~pair.isnan()]) for pair in pairs], dtype=torch.float64)

    @property
    def cells(self) -> int:
        """Number of values of the tables."""
        return sum(table.cells for table in self.tables)

    def compare(self, deviations: Sequence[Tensor], level: float) -> MethodComparison:
        """The comparison, from the deviations (R, K) of the resampled means of every table."""
        compared = MethodComparison([None for _ in range(self.methods)], {}, [None for _ in range(self.methods)])
        own = self.tables[0].chosen(slice(len(self.used)))
        for number, interval in zip(self.used, intervals(own, deviations[0][:, : len(self.used)], level)):
            compared.intervals[number] = interval
        if self.better and len(self.tables[-1].sums):
            every = ranks_of(self.tables[-1], deviations[-1], self.better, level)
            for number, rank in zip(self.used, every):
                compared.ranks[number] = rank
        compared.differences.update(self._differences(deviations[0], level))
        return compared

    def _differences(self, deviations: Tensor, level: float) -> Iterator[tuple[tuple[int, int], Difference]]:
        """The differences of all pairs with common samples, from the deviations of the first table."""
        drawn, table = self._of_pairs(deviations, torch.sub), self._pair_table()
        p, adjusted = step_down(self.means, drawn, table.freedom())
        alone = intervals(table, drawn, level)
        for (a, b), interval, *values in zip(self.pairs.tolist(), alone, p.tolist(), adjusted.tolist()):
            if interval.n:
                figures = (interval.mean, interval.low, interval.high, interval.n)
                yield (self.used[a], self.used[b]), Difference(*figures, *values)

    def _of_pairs(self, columns: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Columns (..., P) of the pairs: combined from those of both methods, or their own if the pair is `apart`."""
        first, second = self.pairs.T
        found = combine(columns[..., first], columns[..., second])
        found[..., self.apart] = columns[..., len(self.used) :]
        return found

    def _pair_table(self) -> MeanTable:
        """The table of the differences of all pairs."""
        table = self.tables[0]
        counts, size_of = (self._of_pairs(c, lambda first, _: first) for c in (table.counts, table.size_of))
        # Percentiles do not read the sums, which for many samples and pairs would be larger than memory.
        placeholder = table.sums[:, :1].expand(-1, len(self.pairs))
        pairs = MeanTable(self.means, counts, placeholder, table.sizes, size_of)
        if bool((pairs.units() < FEW).any()):
            return replace(pairs, sums=self._of_pairs(table.sums, torch.sub))
        return pairs


def _chosen(groups: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if groups is None else groups[rows]


def step_down(differences: Tensor, drawn: Tensor, freedom: Tensor) -> tuple[Tensor, Tensor]:
    """p-values of mean differences from shared resamples: alone, and all taken together (step-down max-T).

    The statistic of a pair is its absolute difference by the standard deviation s of its resamples. Under the null
    hypothesis it is distributed as |d* - d| / s over the resamples d*. Taken together, a pair is compared with the
    maximum over this pair and all with smaller statistics (Westfall and Young 1993, algorithm 2.8; Romano and Wolf
    2005), which keeps the probability of any false difference at the level whatever the correlation of the pairs. For
    G units the statistic, of Student's t distribution with G - 1 degrees of freedom, is first turned into the normal
    quantile of the same probability; s is widened as the bounds of intervals are (`MeanTable.bounds`).

    Resamples of equal differences have no spread, which with few units is no evidence: no p-value is below 2^(1 - G),
    the smallest of the sign test, and without spread the adjusted one is at least P times that (Bonferroni).

    Args:
        differences: (P,) mean differences d.
        drawn: (R, P) deviations d* - d of the resampled differences; a NaN counts as 0.
        freedom: (P,) number of units G; pairs with fewer than two have no p-value.

    Returns:
        p (P,) and adjusted p (P,), in (0, 1]; NaN without a p-value. Of one pair they are equal.

    Example:
        >>> drawn = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
        >>> step_down(torch.tensor([3.0], dtype=torch.float64), drawn, torch.tensor([100.0]))
        (tensor([0.2000], dtype=torch.float64), tensor([0.2000], dtype=torch.float64))
    """
    p, adjusted = (torch.full_like(differences, math.nan) for _ in range(2))
    known = ((freedom > 1.5) & differences.isfinite()).nonzero()[:, 0]
    if not len(known):
        return p, adjusted
    drawn = drawn[:, known].nan_to_num_()
    spread = drawn.square().mean(0).sqrt()
    statistic = _normal_statistic(differences[known].abs(), spread, freedom[known])
    order = statistic.argsort(descending=True, stable=True)
    # Resamples in steps, such as those of shares, may equal the statistic up to rounding; they count.
    reached = statistic[order] * (1 - _SAME)
    alone, together = (torch.zeros(len(known), dtype=torch.float64) for _ in range(2))
    for block in drawn[:, order].split(max(1, _CELLS // len(known))):
        null = block.abs().div_(spread[order]).nan_to_num_()
        alone += (null >= reached).sum(0)
        # The maximum over a pair and those behind it in the order of the statistics.
        together += (null.flip(1).cummax(1).values.flip(1) >= reached).sum(0)
    total = len(drawn) + 1
    p[known[order]] = (1 + alone) / total
    # A pair cannot stand where one with a larger statistic falls.
    adjusted[known[order]] = ((1 + together) / total).cummax(0).values
    least = torch.exp2(1 - freedom[known].double())
    equal = spread <= _SAME * differences[known].abs()
    p[known] = p[known].maximum(least)
    adjusted[known] = adjusted[known].maximum(torch.where(equal, len(known) * least, least).clamp(max=1))
    return p, adjusted


def _normal_statistic(size: Tensor, spread: Tensor, freedom: Tensor) -> Tensor:
    """|d| / s of few units as the normal quantile of the same probability; 0 for a difference of 0 without spread."""
    from scipy.special import ndtri, stdtr  # half a second, which the explanation of a picture need not cost

    # The resamples of G units vary by (G - 1) / G of the variance, and are widened as the bounds of intervals are.
    t = size / (spread * (freedom / (freedom - 1)).pow(1.5))
    normal = torch.as_tensor(-ndtri(stdtr((freedom - 1).numpy(), -t.numpy())))
    return torch.where(size == 0, 0.0, normal)


def ranks_of(table: MeanTable, deviations: Tensor, better: int, level: float) -> list[Rank]:
    """The rank of every column of a table without missing values.

    Intervals of ranks are percentiles of the ranks in the resamples. The resampled means are not widened as the bounds
    of intervals are: that could make a method the best which is worse on every sample.

    Args:
        table: means of M methods over the same samples.
        deviations: (R, M) of its resamples.
        better: 1 if higher is better, -1 if lower is.
        level: coverage of the intervals of ranks.
    """
    freedom = float(table.freedom()[0])
    side = (1 + level) / 2
    own = _rank(better * table.means[None])[0]
    # An infinite mean, whose resamples are unknown, keeps its rank.
    drawn = _rank(better * (table.means + deviations.masked_fill(~table.means.isfinite(), 0.0)), _noise(table))
    wins = (drawn == drawn.amin(1, keepdim=True)).double()
    p_best = (wins / wins.sum(1, keepdim=True)).mean(0)
    bounds = np.quantile(drawn.numpy(), [1 - side, side], axis=0, method="inverted_cdf").T
    if freedom <= 1:  # every resample is the same
        p_best, bounds = torch.full_like(own, math.nan), np.full(bounds.shape, math.nan)
    count = int(table.counts[0])
    columns = zip(own.tolist(), *bounds.T.tolist(), p_best.tolist())
    return [Rank(rank, low, high, best, count) for rank, low, high, best in columns]


def _noise(table: MeanTable) -> Tensor:
    """(M,) rounding errors of resampled means, of sums in fixed point (`resampled_sums`); 0 for infinite means."""
    units = len(table.sums)
    step = table.sums.abs().amax(0) * 2.0 ** ((units - 1).bit_length() - 51)
    return (step * units / table.counts).nan_to_num(posinf=0.0)


def _rank(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """Ranks (R, M) of scores (R, M) in each row, 1 for the highest; tied scores share the mean of their ranks.

    Scores are tied if they differ by at most 1e-9 of the larger magnitude of the two, and their `noise` (M,).
    """
    noise = torch.zeros_like(scores[0]) if noise is None else noise
    ranks = torch.empty_like(scores)
    size = scores.abs().nan_to_num(posinf=0.0)  # infinite scores are equal or not
    for number, column in enumerate(scores.T[..., None]):
        near = _SAME * torch.maximum(size, size[:, number, None]) + noise + noise[number]
        same = (scores == column) | ((scores - column).abs() <= near)
        above = (scores > column) & ~same
        ranks[:, number] = above.sum(1) + (same.sum(1) + 1) / 2
    return ranks
