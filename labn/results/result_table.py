"""The tables of a results folder as columns, without pandas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labn.errors import InputError, MissingFileError
from labn.io.readers import first_line, read_table
from labn.results.score_files import SCORES, has_pyarrow

if TYPE_CHECKING:
    import pandas

NAMES = ("scores", "summary", "paired", "ranks", "predictions", "counts")

INTEGERS = ("index", "label", "target", "prediction", "group", "n", "count")

BOUNDS = ("ci_low", "ci_high", "rank_low", "rank_high")

NUMBERS = ("value", "mean", "difference", *BOUNDS, "p", "p_adjusted", "rank", "p_best", "probability")


class ResultTable:
    """A table as columns of equal length.

    Args:
        columns: name -> (n,) array: int64 and float64 for numbers, objects for texts.

    Example:
        >>> table = ResultTable({"explainer": np.array(["lrp", "random"], dtype=object), "value": np.array([0.5, 0.0])})
        >>> len(table), table.columns, list(table.rows)
        (2, ('explainer', 'value'), [('lrp', 0.5), ('random', 0.0)])
        >>> table.where(explainer="lrp")["value"]
        array([0.5])
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._columns = dict(columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(self._columns)

    @property
    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows as tuples of Python's own types, in order."""
        return zip(*(column.tolist() for column in self._columns.values()))

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of this name, (n,).

        Raises:
            InputError: there is no such column.
        """
        if name not in self._columns:
            raise InputError(f"the table has no column {name!r}, only {', '.join(self.columns)}.")
        return self._columns[name]

    def where(self, **equal: Any) -> ResultTable:
        """The rows whose columns equal the given values, such as `explainer="lrp", metric="pid16"`.

        Raises:
            InputError: there is no such column.
        """
        chosen = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            chosen &= self[name] == value
        return ResultTable({name: column[chosen] for name, column in self._columns.items()})

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self._columns)

    def __repr__(self) -> str:
        return f"ResultTable({len(self)} rows of {', '.join(self.columns)})"


def read(folder: str | Path, table: str = "scores", stage: str = "test") -> ResultTable:
    """Read a table of a results folder.

    Args:
        folder: a run folder, of which `stage` is read, or a results folder in it.
        table: `scores`, `summary`, `paired`, `ranks`, `predictions` or `counts`. Scores come from `scores.parquet`
            where that file and pyarrow are there, which is faster; the table is the same.
        stage: the results folder in a run folder.

    Returns:
        The table; texts are those of the run, without the apostrophes that protect spreadsheets.

    Raises:
        MissingFileError: the folder has no such table.
        InputError: the name of the table is unknown, or the file is damaged; the message names the file and the line.

    Example:
        >>> import tempfile
        >>> from labn.results.tables import SUMMARY, write_csv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = [("gradcam", "pid16", 0.25, 0.125, 0.375, 20), ("random", "pid16", 0.0, -0.125, 0.125, 20)]
        ...     write_csv(Path(folder) / "test" / "summary.csv", SUMMARY, rows)
        ...     summary = read(folder, "summary")
        >>> summary
        ResultTable(2 rows of explainer, metric, mean, ci_low, ci_high, n)
        >>> summary.where(explainer="gradcam")["mean"]
        array([0.25])
    """
    if table not in NAMES:
        raise InputError(f"unknown table {table!r}; there are {', '.join(NAMES)}.")
    folder = Path(folder)
    path = next((p for p in (folder / f"{table}.csv", folder / stage / f"{table}.csv") if p.is_file()), None)
    if path is None:
        raise MissingFileError(f"{folder} holds no {stage}/{table}.csv; run `test` or `validate` first.")
    if (columnar := path.with_suffix(".parquet")).is_file() and has_pyarrow():
        return ResultTable(_parquet(columnar))
    return ResultTable(_csv(path))


def _csv(path: Path) -> dict[str, np.ndarray]:
    columns: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        columns = {name: [] for name in file.readline().strip().split(",")}
    for row in read_table(path, tuple(columns), escaped=True):
        for name, column in columns.items():
            # Names repeat in every row; each is kept once.
            kind = _kind(name)
            column.append(texts.setdefault(row[name], row[name]) if kind is object else row.number(name, kind))
    return {name: np.array(column, dtype=_kind(name)) for name, column in columns.items()}


def _kind(name: str) -> type:
    """Type of a column. `np.int64` raises for numbers that do not fit, unlike `int`."""
    return np.int64 if name in INTEGERS else np.float64 if name in NUMBERS else object


def _parquet(path: Path) -> dict[str, np.ndarray]:
    from pyarrow import parquet

    # Any error: a damaged file can make pyarrow and the system fail in many ways.
    try:
        stored = parquet.read_table(path, columns=list(SCORES))
        return {name: _column(stored.column(name)) for name in SCORES}
    except Exception as error:
        raise InputError(f"{path} is not a complete Parquet file ({first_line(error)}); test again.") from None


def _column(column: Any) -> np.ndarray:
    """A column of pyarrow as an array; texts are stored as numbers of the texts in a dictionary."""
    if not hasattr(column.type, "index_type"):
        return np.asarray(column.to_numpy())
    chunks = [np.array(chunk.dictionary.to_pylist(), dtype=object)[chunk.indices.to_numpy()] for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype=object)
