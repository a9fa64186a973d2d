"""Geometry of the page's line charts, in the coordinates of the SVG view box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 380, 240
FEW = 12  # up to so many points each gets a dot, because a line with a single point is invisible
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36


@dataclass(frozen=True)
class Series:
    """A line, with a band around it if `low` and `high` are given.

    Attributes:
        name: name in the legend.
        place: number that determines its colour and dash pattern.
        x: (P,) abscissae.
        y: (P,) ordinates.
        low: (P,) lower edge of the band.
        high: (P,) upper edge.
    """

    name: str
    place: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Tick:
    """A tick with its position `at` in view-box units and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series in SVG: path of the line, path of the band (empty without a band), and dots if there are few points."""

    name: str
    place: int
    path: str
    band: str
    dots: list[tuple[str, str]]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: title, also the accessible name.
        x_label: label of the x axis.
        y_label: label of the y axis.
        series: the lines.
        y_range: limits of the y axis; None takes those of the lines and bands.
        whole: whether ticks of the x axis are integers.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_range: tuple[float, float] | None = None
    whole: bool = False

    @property
    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Limits of the x and the y axis, each with low < high."""
        x = [value for line in self.series for value in line.x]
        edges = [e for s in self.series for e in (s.y, s.low, s.high) if e is not None]
        return span(x), self.y_range or span([value for edge in edges for value in edge])

    @property
    def x_ticks(self) -> list[Tick]:
        """Ticks of the x axis."""
        limits = self.limits[0]
        ticks = nice_ticks(*limits, least=1.0 if self.whole else 0.0)
        return [Tick(round(_place(v, limits, LEFT, WIDTH - RIGHT), 1), f"{v:.6g}") for v in ticks]

    @property
    def y_ticks(self) -> list[Tick]:
        """Ticks of the y axis."""
        limits = self.limits[1]
        return [Tick(round(_place(v, limits, HEIGHT - BOTTOM, TOP), 1), f"{v:.6g}") for v in nice_ticks(*limits)]

    @property
    def lines(self) -> list[Line]:
        """The series as SVG paths."""
        return [self._line(series) for series in self.series]

    def _line(self, series: Series) -> Line:
        points = self._points(series.x, series.y)
        dots = points if len(points) <= FEW else []
        return Line(series.name, series.place, _path(points), self._band(series), dots)

    def _points(self, x: np.ndarray, y: np.ndarray) -> list[tuple[str, str]]:
        across, up = self.limits
        return [
            (f"{_place(a, across, LEFT, WIDTH - RIGHT):.1f}", f"{_place(b, up, HEIGHT - BOTTOM, TOP):.1f}")
            for a, b in zip(x, y)
            if math.isfinite(b)  # a gap, such as an epoch without validation, is drawn over
        ]

    def _band(self, series: Series) -> str:
        if series.low is None or series.high is None:
            return ""
        # Along the upper edge, then back along the lower one.
        edge = [*self._points(series.x, series.high), *self._points(series.x[::-1], series.low[::-1])]
        return _path(edge) + "Z"


def legend(panels: Sequence[Panel]) -> list[tuple[str, int]]:
    """Name and place of every line in a group of panels, without duplicates."""
    return list(dict.fromkeys((line.name, line.place) for panel in panels for line in panel.series))


def nice_ticks(low: float, high: float, count: int = 5, least: float = 0.0) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten in [low, high], at least `least` apart."""
    raw = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(raw))
    # The tolerances here and below absorb rounding, such as 0.1 * 3 > 0.3, which would drop a tick at a limit.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _path(points: Sequence[tuple[str, str]]) -> str:
    return "M" + "L".join(" ".join(point) for point in points) if points else ""


def span(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest finite value; equal ones are widened by 0.5 to both sides; (0, 1) without finite values."""
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _place(value: float, limits: tuple[float, float], start: float, end: float) -> float:
    return start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start)
