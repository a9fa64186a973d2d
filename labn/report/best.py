"""The best values of a table's columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from labn.metrics.registry import describe_value
from labn.report.page import Cell, Table

Differences = Mapping[tuple[str, str], Cell]
"""(row a, row b) -> difference a - b on the same samples."""


def with_best(table: Table | None, differences: Mapping[str, Differences], quantity: str) -> Table | None:
    """The table with its best cells marked.

    A cell is marked if its mean is the best of its column, or if its difference from that one is not decided: the 95 %
    interval of the paired difference includes 0. Without a paired difference the two intervals decide by overlapping.
    Columns whose values have neither a better end nor an interval have no marked cell.

    Args:
        table: the table; None is returned as it is.
        differences: column -> differences between the rows.
        quantity: what insertion and deletion curves show, `probability` or `logit`.
    """
    if table is None:
        return None
    best: set[tuple[str, str]] = set()
    for place, column in enumerate(table.columns):
        sign = describe_value(column, quantity).sign
        cells = {row: cell for row, cells in table.rows.items() if (cell := cells[place]) is not None and cell.bounded}
        best |= {(row, column) for row in _best_rows(cells, sign, differences.get(column, {}))}
    return replace(table, best=frozenset(best))


def _best_rows(cells: Mapping[str, Cell], sign: int, differences: Differences) -> Iterator[str]:
    finite = {row: cell for row, cell in cells.items() if math.isfinite(cell.mean)}
    if not sign or len(finite) < 2:
        return
    leader = max(finite, key=lambda row: sign * finite[row].mean)
    for row, cell in finite.items():
        if row == leader or not _is_worse(cell, finite[leader], differences.get((leader, row)), sign):
            yield row


def _is_worse(cell: Cell, leader: Cell, difference: Cell | None, sign: int) -> bool:
    """Whether an interval shows that a cell's value is worse than the leader's."""
    if difference is not None and difference.bounded:
        return difference.decided and sign * difference.mean > 0
    return cell.high < leader.low if sign > 0 else cell.low > leader.high


def both_directions(pairs: Sequence[tuple[str, str, Cell]]) -> dict[tuple[str, str], Cell]:
    """Differences a - b of (a, b, cell), and b - a with the opposite sign and exchanged bounds."""
    return {
        key: value
        for a, b, cell in pairs
        for key, value in (((a, b), cell), ((b, a), replace(cell, mean=-cell.mean, low=-cell.high, high=-cell.low)))
    }


def standing_pairs(differences: Mapping[str, Differences]) -> dict[str, set[tuple[str, str]]]:
    """Value -> pairs of rows whose difference stands when all pairs are taken together."""
    return {value: {pair for pair, cell in pairs.items() if cell.stands} for value, pairs in differences.items()}
