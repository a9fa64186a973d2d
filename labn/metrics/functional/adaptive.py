"""Curves at as few of their points as an error of the area allows: intervals are halved where a curve bends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.002
"""Error of the area at which refinement ends."""

FIRST_POINTS = 9
"""Points of every curve to begin with, equally spaced."""

HALVED_AT_ONCE = 4
"""Intervals of a sample that are halved together, so that forwards fill a chunk."""

REACH = 3
"""Points on either side of an interval whose bends count for it."""

DEVIATIONS = 4.0
"""The bound in standard deviations of the area."""


@dataclass(frozen=True)
class AdaptiveCurves:
    """Curves that were evaluated at some of their points; straight lines connect these.

    Attributes:
        heights: (S, C, K) float64, C curves of S samples at all K points.
        error: (S,) float64, estimated bound of the error of the C areas together, see `adaptive_curves`.
        evaluated: (S,) int64, number of points that were evaluated, of all curves of the sample.
    """

    heights: Tensor
    error: Tensor
    evaluated: Tensor


class _Grid:
    """The K points of the curves of S samples.

    Attributes:
        x: (S, K) float64, non-decreasing.
        first: (S, K) int64, the first point with the same x: tied patches move together, so that such points are one.
        place: (S, K) int64, number of smaller values of x.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x.contiguous()
        self.first = torch.searchsorted(self.x, self.x)
        self.place = F.pad((self.x.diff(dim=1) > 0).cumsum(1), (1, 0))

    @property
    def last(self) -> Tensor:
        """The point (S, 1) where the curves end; lists of points of different lengths are filled up with it."""
        return self.first[:, -1:]

    def of(self, samples: Tensor) -> _Grid:
        """The grid of some samples."""
        return _Grid(self.x[samples])

    def nearest(self, x: Tensor) -> Tensor:
        """The points (S, P) nearest to x (S, P); of two equally near ones the left."""
        right = torch.searchsorted(self.x, x.contiguous()).clamp(max=self.x.shape[1] - 1)
        right = self.first.gather(1, right)
        left = self.first.gather(1, (right - 1).clamp(min=0))
        nearer = x - self.x.gather(1, left) <= self.x.gather(1, right) - x
        return torch.where(nearer, left, right)


def _at(values: Tensor, points: Tensor) -> Tensor:
    """Values (S, K) at the points (S, C, P) of C curves."""
    return values[:, None].expand(-1, points.shape[1], -1).gather(2, points)


def _first_points(grid: _Grid) -> Tensor:
    """Equally spaced points (S, P), each once; filled up with the last one."""
    wanted = torch.linspace(0, 1, FIRST_POINTS, dtype=grid.x.dtype) * grid.x[:, -1:]
    points = grid.nearest(wanted)
    again = F.pad(points.diff(dim=1) == 0, (1, 0))
    return torch.where(again, grid.last, points).sort(1).values


def interval_variances(grid_x: Tensor, places: Tensor, heights: Tensor) -> Tensor:
    """Estimated variance of the area between the chord and the curve, of every interval of points.

    At a point between two others, with distances a and b, a curve bends by its height over their chord, r. Of a
    Brownian motion with variance q per unit of x, r has the variance q a b / (a + b), so that r^2 (a + b) / (a b)
    estimates q. An interval of width w and n steps has the largest q of the three nearest points on either side: one
    bend may be small by chance. The trapezoid rule with its n - 1 inner points then differs from the chord's area
    by the variance q w^3 / 12 (1 - 1 / n^2).

    Args:
        grid_x: (S, C, P) float64, x of the points, non-decreasing.
        places: (S, C, P) int64, their numbers among all different points.
        heights: (S, C, P) float64.

    Returns:
        (S, C, P - 1) float64; 0 for an interval without a point in between.
    """
    width, steps = grid_x.diff(), places.diff()
    left, right = width[..., :-1], width[..., 1:]
    chord = (heights[..., :-2] * right + heights[..., 2:] * left) / (left + right)
    rates = (heights[..., 1:-1] - chord).square() * (left + right) / (left * right)
    # The ends have no bend, and neither have the copies of the last point.
    rates = F.pad(torch.where((left > 0) & (right > 0), rates, 0), (REACH, REACH))
    largest = F.max_pool1d(rates, 2 * REACH, stride=1)
    return torch.where(steps > 1, largest * width**3 / 12 * (1 - steps.clamp(min=1).double() ** -2), 0)


def _halves(grid: _Grid, points: Tensor, variances: Tensor) -> Tensor:
    """New points (S, C, Q), the middles of each sample's intervals with the largest variances (S, C, P - 1)."""
    # In eighths of octaves, the first of equal ones first: the last digits, which differ from chunk to chunk,
    # rarely decide.
    order = (8 * variances.flatten(1).log2()).round().sort(dim=1, descending=True, stable=True)
    chosen, found = order.indices[:, :HALVED_AT_ONCE], order.values[:, :HALVED_AT_ONCE].isfinite()
    x = _at(grid.x, points)
    middles = grid.nearest(((x[..., 1:] + x[..., :-1]) / 2).flatten(1).gather(1, chosen))
    curve = (chosen // variances.shape[2])[:, None] == torch.arange(points.shape[1])[:, None]
    return torch.where(curve & found[:, None], middles[:, None], grid.last[..., None])


def _merged(grid: _Grid, points: Tensor, heights: Tensor, samples: Tensor, new: Tensor, added: Tensor) -> list[Tensor]:
    """Points and heights (S, C, P) with the new ones (A, C, Q) of some samples."""
    more = grid.last[..., None].repeat(1, points.shape[1], new.shape[2])
    more_heights = heights[..., -1:].repeat(1, 1, new.shape[2])
    more[samples], more_heights[samples] = new, added
    order = torch.cat([points, more], 2).sort(dim=2, stable=True)
    width = int((order.values < grid.last[..., None]).sum(2).max()) + 1
    merged = torch.cat([heights, more_heights], 2).gather(2, order.indices)
    return [order.values[..., :width], merged[..., :width]]


def _lines(grid: _Grid, points: Tensor, heights: Tensor) -> Tensor:
    """Heights (S, C, K) on the straight lines between the points (S, C, P)."""
    known, x = _at(grid.x, points), grid.x[:, None].expand(-1, points.shape[1], -1).contiguous()
    right = torch.searchsorted(known, x).clamp(max=points.shape[2] - 1)
    left = (right - 1).clamp(min=0)
    (start, end), (low, high) = ((t.gather(2, left), t.gather(2, right)) for t in (known, heights))
    # Written from the right end, so that an evaluated point keeps its exact digits.
    return high - torch.where(end > start, (end - x) / (end - start), 0) * (high - low)


def adaptive_curves(
    x: Tensor, evaluate: Callable[[Tensor, Tensor], Tensor], tolerance: float = TOLERANCE, curves: int = 2
) -> AdaptiveCurves:
    """Curves evaluated at points that are added until the error of their areas is at most `tolerance`.

    Every curve begins with 9 points. The intervals with the largest estimated error are halved, four at a time. Each
    sample decides for itself, from its own heights. Points with equal x, whose patches are tied, are one point.

    The error is against the trapezoid rule over all points. Its bound is 4 standard deviations, with the variances of
    `interval_variances` added over the intervals of all curves. It assumes that a curve strays from a chord as it bends
    at the points around, and independently in every interval; a peak between points that lie on one line is not seen.
    Where every point has been evaluated, the bound is 0.

    Args:
        x: (S, K) float64, x of the points, non-decreasing.
        evaluate: positions of samples (A,), points (A, C, P) -> heights (A, C, P). Points may repeat.
        tolerance: largest bound.
        curves: C.

    Example:
        >>> x = torch.linspace(0, 1, 101, dtype=torch.float64)[None]
        >>> found = adaptive_curves(x, lambda samples, points: (x[0, points] - 0.5).abs(), curves=1)
        >>> int(found.evaluated), torch.allclose(found.heights[0], (x - 0.5).abs())
        (25, True)
    """
    grid, everyone = _Grid(x.detach().cpu().double()), torch.arange(len(x))
    points = _first_points(grid)[:, None].repeat(1, curves, 1)
    heights = evaluate(everyone, points).cpu().double()
    while True:
        variances = interval_variances(_at(grid.x, points), _at(grid.place, points), heights)
        error = DEVIATIONS * variances.sum((1, 2)).sqrt()
        open_ones = (error > tolerance).nonzero().flatten()
        if not len(open_ones):
            break
        new = _halves(grid.of(open_ones), points[open_ones], variances[open_ones])
        added = evaluate(open_ones, new).cpu().double()
        points, heights = _merged(grid, points, heights, open_ones, new, added)
    evaluated = (points < grid.last[..., None]).sum((1, 2)) + curves
    return AdaptiveCurves(*(t.to(x.device) for t in (_lines(grid, points, heights), error, evaluated)))
