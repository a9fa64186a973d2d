"""The CSV log of a command: rows are written completely, and errors name the file."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from labn.io.atomic import check_not_removed, write_atomically, write_error
from labn.io.table_cells import csv_bytes


class RowWriter(ExperimentWriter):
    """Appends rows to `metrics.csv`; when a new column appears, the file is rewritten atomically.

    Lightning's own writer truncates the file before it writes the rows again, and a process killed in between loses
    them.

    Args:
        log_dir: folder of the log; rows that an earlier command left there are replaced, with a warning.
    """

    def __init__(self, log_dir: str) -> None:
        path = Path(log_dir) / self.NAME_METRICS_FILE
        if path.is_file():
            warnings.warn(f"{path} is of an earlier command; this one replaces it.", stacklevel=2)
        with warnings.catch_warnings():
            # Lightning says so of any file in the folder, such as the settings that a killed command has left.
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            super().__init__(log_dir=log_dir)

    def save(self) -> None:
        """Write the metrics logged since the last call.

        Raises:
            FileError: the file is not writable, the disk is full, or earlier rows of this command have been removed.
        """
        if not self.metrics:
            return
        path, rows = Path(self.metrics_file_path), list(self.metrics)
        keys = sorted(set(self.metrics_keys).union(*rows))
        same_columns, has_written = keys == self.metrics_keys, bool(self.metrics_keys)
        self.metrics, self.metrics_keys = [], keys
        if has_written:
            check_not_removed(path)
        if same_columns:
            with named(path), path.open("ab") as file:
                file.write(as_csv(keys, rows).split(b"\n", 1)[1])
        else:
            write_atomically(path, as_csv(keys, [*read_rows(path), *rows]))

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write the hyper-parameters to `hparams.yaml`; errors as in `save`."""
        with named(Path(self.log_dir) / self.NAME_HPARAMS_FILE):
            super().log_hparams(params)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into one that names `path`.

    A full disk is reported when a file is flushed or closed, with an error that holds no file name.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def as_csv(keys: list[str], rows: list[dict[str, Any]]) -> bytes:
    """Rows as CSV with the columns `keys`; missing values are empty."""
    return csv_bytes(keys, ([row.get(key, "") for key in keys] for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class RunLogger(CSVLogger):
    """Lightning's `CSVLogger` that writes with a `RowWriter`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> RowWriter:
        """The writer; on ranks above zero a dummy that does nothing."""
        if self._experiment is None:
            self._experiment = RowWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, RowWriter)
        return self._experiment
