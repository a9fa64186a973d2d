"""Ranks of methods as a figure: every method with the interval of its rank, and bars over methods that stand together.

The figure takes after the critical difference diagram (Demsar 2006), with the tests of `labn.metrics.comparisons`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from labn.metrics.comparisons import Rank
from labn.report.charts import Tick

LEFT, WIDTH, RIGHT, ROW, TOP, GAP = 150, 380, 12, 22, 24, 9
LONGEST = 22  # characters of a name in the figure; longer ones are cut


@dataclass(frozen=True)
class RankRow:
    """A method of the figure.

    Attributes:
        name: name of the method.
        place: number that determines its colour.
        rank: its rank.
        y: ordinate of its line in view-box units; `x`, `low` and `high` are abscissae of rank and interval.
    """

    name: str
    place: int
    rank: Rank
    y: float
    x: float
    low: float
    high: float

    @property
    def label(self) -> str:
        """The name, cut to the width of the figure's margin."""
        return self.name if len(self.name) <= LONGEST else f"{self.name[: LONGEST - 1]}…"

    @property
    def bounded(self) -> bool:
        """Whether the rank has an interval; that of one sample has none."""
        return not math.isnan(self.rank.low)

    @property
    def chance(self) -> str:
        """Probability of being the best in per cent."""
        return "–" if math.isnan(self.rank.p_best) else f"{100 * self.rank.p_best:.0f} %"


@dataclass(frozen=True)
class Ranking:
    """Ranks of the methods in one value.

    Attributes:
        value: name of the value.
        rows: the methods, the best first.
        together: (first, last) positions in `rows` of methods of which no pair's difference stands.
    """

    value: str
    rows: tuple[RankRow, ...]
    together: tuple[tuple[int, int], ...]

    @property
    def height(self) -> int:
        """Height of the view box."""
        return TOP + ROW * len(self.rows) + 4

    @property
    def width(self) -> int:
        """Width of the view box."""
        return WIDTH + RIGHT + GAP * len(self.together)

    @property
    def ticks(self) -> list[Tick]:
        """One tick per rank, at most about ten."""
        count = len(self.rows)
        return [Tick(_abscissa(rank, count), str(rank)) for rank in range(1, count + 1, max(1, math.ceil(count / 10)))]

    @property
    def bars(self) -> list[tuple[float, float, float]]:
        """(x, y1, y2) of a bar beside the methods of every group in `together`."""
        ends = [(self.rows[first].y, self.rows[last].y) for first, last in self.together]
        return [(WIDTH + RIGHT + GAP * n - 4, y1 - 5, y2 + 5) for n, (y1, y2) in enumerate(ends)]


def rankings(
    names: Sequence[str],
    values: Iterable[str],
    ranks: Mapping[tuple[str, str], Rank],
    standing: Mapping[str, Collection[tuple[str, str]]],
) -> list[Ranking]:
    """The ranking of every value with ranks of at least two methods.

    Args:
        names: names of the methods, in the order of the tables.
        values: names of the values.
        ranks: (method, value) -> rank.
        standing: value -> pairs of methods, in both directions, whose difference stands.
    """
    found = []
    for value in values:
        methods = {name: ranks[name, value] for name in names if (name, value) in ranks}
        if len(methods) > 1:
            order = sorted(methods, key=lambda name: methods[name].rank)
            rows = tuple(_row(name, names.index(name), methods[name], n, len(order)) for n, name in enumerate(order))
            found.append(Ranking(value, rows, together(order, standing.get(value, ()))))
    return found


def together(order: Sequence[str], standing: Collection[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
    """(first, last) of the longest runs of methods, in the given order, without a pair in `standing`.

    Example:
        >>> together("abc", {("a", "c")})
        ((0, 1), (1, 2))
    """
    runs: list[tuple[int, int]] = []
    for first in range(len(order)):
        last = first
        while last + 1 < len(order) and all(
            (name, order[last + 1]) not in standing for name in order[first : last + 1]
        ):
            last += 1
        # A run inside the one before it says nothing new.
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return tuple(runs)


def _row(name: str, place: int, rank: Rank, number: int, count: int) -> RankRow:
    low, high = (rank.rank if math.isnan(bound) else bound for bound in (rank.low, rank.high))
    x, left, right = (_abscissa(value, count) for value in (rank.rank, low, high))
    return RankRow(name, place, rank, TOP + ROW * (number + 0.5), x, left, right)


def _abscissa(rank: float, count: int) -> float:
    return round(LEFT + 10 + (rank - 1) / (count - 1) * (WIDTH - LEFT - 20), 1)
