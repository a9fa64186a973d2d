"""The CSV log of a command: whole rows, whatever happens, and errors that name the file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from labn.io.atomic import write_atomically, write_error
from labn.results.tables import csv_bytes


class RowWriter(ExperimentWriter):
    """Appends rows; a new column, which needs the file anew, replaces it at once instead of emptying it first."""

    def save(self) -> None:
        """Write the metrics that have come since the last call.

        Raises:
            OSError: the file cannot be written, or the disk is full.
        """
        if not self.metrics:
            return
        path, rows = Path(self.metrics_file_path), list(self.metrics)
        keys = sorted(set(self.metrics_keys).union(*rows))
        known = keys == self.metrics_keys and path.is_file()
        self.metrics, self.metrics_keys = [], keys
        if known:
            with named(path), path.open("ab") as file:
                file.write(as_csv(keys, rows).split(b"\n", 1)[1])
        else:
            write_atomically(path, as_csv(keys, [*read_rows(path), *rows]))

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write the hyper-parameters, see `save`."""
        with named(Path(self.log_dir) / self.NAME_HPARAMS_FILE):
            super().log_hparams(params)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name `path` in an error that may not: a full disk shows when a file is closed."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def as_csv(keys: list[str], rows: list[dict[str, Any]]) -> bytes:
    """Rows under a header of `keys`."""
    return csv_bytes(keys, ([row.get(key, "") for key in keys] for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class RunLogger(CSVLogger):
    """Lightning's `CSVLogger` with a `RowWriter`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> RowWriter:
        """The writer; on ranks above zero one that does nothing."""
        if self._experiment is None:
            self._experiment = RowWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, RowWriter)
        return self._experiment
