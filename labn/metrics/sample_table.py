"""Table of per-sample values that merges the rows of several processes and runs, each sample once and sorted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class SampleTable:
    """Columns of values by sample; the first value of a repeated sample counts.

    Metrics merge the rows of all ranks with it, results folders the shards of all ranks and runs.

    Args:
        index: (S,) int64, sorted sample indices, each once.
        columns: number of columns.
        values: (columns, S) float64 array to fill, such as a memory map of NaN; None: a new array.

    Attributes:
        values: (columns, S) float64, NaN where no value was added.

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
        """Locate samples in the table.

        Args:
            samples: (n,) int64 sample indices, of which some may repeat or be absent from the table.

        Returns:
            Positions in the table, each once, and the first positions of the same samples in `samples`.
        """
        distinct, first = np.unique(samples, return_index=True)
        # searchsorted returns len(index) for samples beyond the last; the comparison below drops them.
        positions = np.minimum(np.searchsorted(self.index, distinct), max(len(self.index) - 1, 0))
        present = np.flatnonzero(self.index[positions] == distinct) if len(self.index) else np.zeros(0, dtype=np.int64)
        return positions[present], first[present]

    def add(self, samples: np.ndarray, columns: Mapping[int, np.ndarray]) -> None:
        """Add values; values that are in the table already stay.

        Args:
            samples: (n,) int64 sample indices.
            columns: number of a column -> (n,) values.
        """
        positions, sources = self.positions(samples)
        for number, values in columns.items():
            column = self.values[number]
            present = column[positions]
            column[positions] = np.where(np.isnan(present), values[sources], present)
