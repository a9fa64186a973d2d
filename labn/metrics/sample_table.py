"""Per-sample values, merged: each sample once and in order, whatever process or earlier run scored it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class SampleTable:
    """Columns of values by sample; of a sample that comes twice the first value counts.

    Metrics merge the values of all ranks by it, and results folders the shards of all ranks and runs.

    Args:
        index: (S,) int64 samples, sorted, each once.
        columns: number of columns.
        values: (columns, S) float64 that the table fills, such as a memory map; None: an array of its own.

    Attributes:
        values: (columns, S) float64, NaN where there is no value yet.

    Example:
        >>> table = SampleTable(np.array([3, 5]), columns=1)
        >>> table.add(np.array([5, 3, 5]), {0: np.array([0.5, 0.25, 9.0])})
        >>> table.values.tolist()
        [[0.25, 0.5]]
    """

    def __init__(self, index: np.ndarray, columns: int, values: np.ndarray | None = None) -> None:
        self.index = index
        self.values = np.full((columns, len(index)), np.nan) if values is None else values

    def positions(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the table of those `samples` (n,) that it has, each once, and their positions in `samples`."""
        known, first = np.unique(samples, return_index=True)
        positions = np.minimum(np.searchsorted(self.index, known), max(len(self.index) - 1, 0))
        found = np.flatnonzero(self.index[positions] == known) if len(self.index) else np.zeros(0, dtype=np.int64)
        return positions[found], first[found]

    def add(self, samples: np.ndarray, columns: Mapping[int, np.ndarray]) -> None:
        """Take over values of `samples` (n,): number of a column -> (n,); what the table knows already stays."""
        positions, rows = self.positions(samples)
        for number, values in columns.items():
            column = self.values[number]
            known = column[positions]
            column[positions] = np.where(np.isnan(known), values[rows], known)
