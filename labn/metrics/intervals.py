"""Intervals of means over units that are drawn as a whole: BCa for few units, percentiles for many.

BCa (bias-corrected and accelerated, Efron 1987) chooses the percentiles of the resamples from two numbers: the bias z0,
how far the median of the resamples lies from the estimate, and the acceleration a, a sixth of the skewness of the
jackknife. With few units two effects remain, which `MeanTable.bounds` corrects: the resamples vary too little, and the
standard error is itself uncertain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labn.io.digits import decimals
from labn.metrics.resampling import resampled_sums

FEW = 300
"""Number of units from which intervals are percentiles; their coverage then equals that of BCa."""

_TIE = 1e-6  # resamples that differ from the estimate by this share of their deviation equal it, up to rounding


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
        return "" if math.isnan(self.low) else f" [{decimals(self.low)}, {decimals(self.high)}]"


@dataclass(frozen=True)
class MeanTable:
    """Means of K columns over G units (samples, or groups of samples).

    Attributes:
        means: (K,) means over samples.
        counts: (K,) int64, number of samples of each column.
        sums: (G, K) sums over each unit of the deviations from the mean.
        sizes: (G, S) numbers of samples of each unit, once for all columns that have the same samples.
        size_of: (K,) int64, the column of `sizes` that belongs to each mean.
    """

    means: Tensor
    counts: Tensor
    sums: Tensor
    sizes: Tensor
    size_of: Tensor

    @property
    def cells(self) -> int:
        """Number of values of `sums` and `sizes`."""
        return self.sums.numel() + self.sizes.numel()

    def chosen(self, columns: slice | Tensor) -> MeanTable:
        """The table of some of the columns."""
        own = self.means[columns], self.counts[columns], self.sums[:, columns]
        return MeanTable(*own, self.sizes, self.size_of[columns])

    def resampled(self, n_resamples: int, seed: int) -> Tensor:
        """(R, K) deviations of the means of R resamples of units from `means`; NaN for a resample without samples."""
        # A mean is a ratio of two sums, so that units of unequal size weigh right.
        drawn = resampled_sums(torch.cat([self.sums, self.sizes], dim=1), n_resamples, seed)
        return self.deviations(drawn)

    def deviations(self, drawn: Tensor) -> Tensor:
        """(R, K) deviations of means from resampled sums (R, K + S) of `sums` and `sizes` side by side."""
        count = self.sums.shape[1]
        return drawn[:, :count] / drawn[:, count:][:, self.size_of]

    def freedom(self) -> Tensor:
        """(K,) effective number of units, (sum s)^2 / sum s^2 for units of s samples (Kish 1965)."""
        return (self.sizes.sum(0).square() / self.sizes.square().sum(0))[self.size_of]

    def units(self) -> Tensor:
        """(K,) number of units that have samples of each column."""
        return (self.sizes > 0).sum(0)[self.size_of]

    def bounds(self, deviations: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (K,) of the means; NaN for columns with fewer than two units or an infinite mean.

        From `FEW` units on they are percentiles of the resamples. Below, they are those of BCa at the level of
        Student's t instead of the normal distribution (Hesterberg 2015), their distance from the mean is multiplied by
        G / (G - 1), and they stay between the smallest and the largest mean of a unit. The factor has no derivation:
        it is the smallest power of sqrt(G / (G - 1)) that gives skewed distributions a coverage of .93 from nine units
        on (`tests/benchmarks/intervals.py`).

        Args:
            deviations: (R, K) from `resampled`.
            level: coverage, in (0, 1).
        """
        if len(self.sums) < 2:
            return torch.full_like(self.means, torch.nan), torch.full_like(self.means, torch.nan)
        units = self.units()
        levels = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64).expand(len(units), 2)
        few = units < FEW
        if bool(few.any()):
            levels = torch.where(few[:, None], self._bca_levels(deviations, level), levels)
        low, high = quantiles(deviations, levels).unbind(1)
        if bool(few.any()):
            low, high = (torch.where(few, self._widened(bound), bound) for bound in (low, high))
        unknown = (units < 2) | ~self.means.isfinite()
        return (self.means + low).masked_fill(unknown, torch.nan), (self.means + high).masked_fill(unknown, torch.nan)

    def _bca_levels(self, deviations: Tensor, level: float) -> Tensor:
        sizes = self.sizes[:, self.size_of]
        jackknife = (self.sums.sum(0) - self.sums) / (sizes.sum(0) - sizes)
        jackknife = jackknife.masked_fill(sizes == 0, torch.nan)
        return bca_levels(bias(deviations), acceleration(jackknife), level, self.freedom())

    def _widened(self, bound: Tensor) -> Tensor:
        freedom = self.freedom()
        # A unit without samples counts as the mean, which is inside the range.
        unit_means = (self.sums / self.sizes[:, self.size_of]).nan_to_num()
        return torch.clamp(bound * freedom / (freedom - 1), unit_means.amin(0), unit_means.amax(0))


def bca_levels(bias: Tensor, acceleration: Tensor, level: float, freedom: Tensor | None = None) -> Tensor:
    """Levels of the percentiles of the resamples that bound the interval BCa (Efron 1987, eq. 3.8).

        Phi(z0 + (z0 + z) / (1 - a (z0 + z))),  z = -+ Phi^-1((1 + level) / 2)

    With zero bias and acceleration they are (1 -+ level) / 2, those of the percentile interval.

    Args:
        bias: (K,) z0.
        acceleration: (K,) a.
        level: coverage, in (0, 1).
        freedom: (K,) number of units G; z is then sqrt(G / (G - 1)) times the quantile of Student's t with
            G - 1 degrees of freedom (Hesterberg 2015). None takes the normal quantile.

    Returns:
        (K, 2) in [0, 1].

    Example:
        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> bca_levels(zero, zero, level=0.9).round(decimals=12).tolist()
        [[0.05, 0.95]]
    """
    from scipy.special import ndtr, ndtri, stdtrit  # half a second, which the explanation of a picture need not cost

    z = torch.full_like(bias, ndtri((1 + level) / 2))
    if freedom is not None:
        degrees = (freedom - 1).clamp(min=1e-3).numpy()
        z = torch.as_tensor(stdtrit(degrees, (1 + level) / 2)) * (freedom / (freedom - 1)).sqrt()
    sides = bias[:, None] + torch.stack([-z, z], dim=1)
    # A denominator of 0 or less puts the bound at the end of the resamples.
    shrunk = (1 - acceleration[:, None] * sides).clamp(min=1e-9)
    return torch.as_tensor(ndtr((bias[:, None] + sides / shrunk).numpy()))


def bias(deviations: Tensor) -> Tensor:
    """z0 (K,) of BCa: the normal quantile of the share of resamples below the estimate, of which ties count half.

    Args:
        deviations: (R, K) of the resamples from the estimate; NaN is left out.
    """
    from scipy.special import ndtri

    present = ~deviations.isnan()
    count = present.sum(0).clamp(min=1)
    spread = (deviations.nan_to_num().square().sum(0) / count).sqrt()
    below = (deviations < -_TIE * spread).sum(0)
    ties = (deviations.abs() <= _TIE * spread).sum(0)
    # No resample, or every one, below the estimate would give an infinite quantile.
    share = ((below + 0.5 * ties) / count).clamp(0.5 / count, 1 - 0.5 / count)
    return torch.as_tensor(ndtri(share.double().numpy()))


def acceleration(jackknife: Tensor) -> Tensor:
    """a (K,) of BCa, sum d^3 / (6 (sum d^2)^1.5) with d the mean of the jackknife minus each value; 0 where d is 0.

    Args:
        jackknife: (G, K) estimates without each unit; NaN is left out.

    Example:
        >>> acceleration(torch.tensor([[1.0], [1.0], [4.0]], dtype=torch.float64)).round(decimals=4).tolist()
        [-0.068]
    """
    d = (jackknife.nanmean(0) - jackknife).nan_to_num()
    squares = d.square().sum(0)
    return torch.where(squares > 0, d.pow(3).sum(0) / (6 * squares.pow(1.5)), 0.0)


def quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles (K, 2) of the columns of values (R, K) at levels (K, 2), linear between neighbours; NaN is left out.

    Example:
        >>> quantiles(torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[0.25, 1.0]])).tolist()
        [[1.5, 3.0]]
    """
    # NumPy sorts ten times faster than torch, and puts NaN last, as torch does.
    ordered = torch.from_numpy(np.sort(values.T.contiguous().numpy(), axis=1))
    count = ordered.isnan().logical_not().sum(1, keepdim=True)
    place = levels.clamp(0, 1) * (count - 1)
    below = place.floor().nan_to_num().clamp(min=0)
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    first, second = (ordered.gather(1, index.long()) for index in (below, above))
    return first + (second - first) * (place - below)
