"""The files of per-sample scores, `scores.csv` and, where pyarrow is installed, `scores.parquet`, block by block."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labn.io.atomic import written_atomically
from labn.io.table_cells import escaped_cell, escaped_method

SCORES = ("split", "index", "name", "label", "target", "explainer", "metric", "value")

Pairs = Sequence[tuple[str, str]]
"""(explainer, value) of every row of a block's `values`."""


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of some samples.

    Attributes:
        index: (b,) int64 sample indices.
        names: names of the samples.
        label: (b,) int64 true classes.
        targets: (C, b) int64 explained classes, one row per pair.
        values: (C, b) float64, one row per pair of explainer and value; NaN if a sample has no value.
    """

    index: np.ndarray
    names: Sequence[str]
    label: np.ndarray
    targets: np.ndarray
    values: np.ndarray


def write_score_csv(path: Path, split: str, pairs: Pairs, blocks: Iterable[ScoreBlock]) -> None:
    """Write `scores.csv`: one row per value, sorted by sample, explainer and metric.

    The bytes are those of `labn.results.tables.write_csv`, at a tenth of its time: cells that repeat are escaped once.
    """
    rows = _RowText(split, pairs)
    with written_atomically(path) as file:
        file.write((",".join(SCORES) + "\n").encode())
        for block in blocks:
            # Transposed per block: values are stored by column, the file is written by sample.
            targets, values = (np.ascontiguousarray(table.T) for table in (block.targets, block.values))
            for n, (index, label) in enumerate(zip(block.index.tolist(), block.label.tolist())):
                text = rows.of_sample(index, block.names[n], label, targets[n].tolist(), values[n].tolist())
                file.write(text.encode())


class _RowText:
    """The rows of a sample as text.

    A row with a carriage return is quoted as a whole, because readers may take a bare one for the end of the row.
    """

    def __init__(self, split: str, pairs: Pairs) -> None:
        cells = [(escaped_method(explainer), escaped_cell(metric)) for explainer, metric in pairs]
        self._split = escaped_cell(split)
        self._plain, self._quoted = ([_text(pair, quoted) for pair in cells] for quoted in (False, True))
        self._special = {number for number, pair in enumerate(cells) if "\r" in "".join(pair)}

    def of_sample(self, index: int, name: str, label: int, targets: list[int], values: list[float]) -> str:
        """The rows of all values that are not NaN."""
        facts = self._split, index, escaped_cell(name), label
        if "\r" in f"{self._split}{name}":
            return self._rows(facts, targets, values, range(len(values)))
        if not self._special:
            start = _text(facts, quoted=False)
            rows = zip(targets, self._plain, values)
            return "".join([f"{start}{target},{pair}{v!r}\n" for target, pair, v in rows if v == v])
        return self._rows(facts, targets, values, self._special)

    def _rows(self, facts: Sequence[Any], targets: list[int], values: list[float], quoted: Iterable[int]) -> str:
        """The rows, of which those with a number in `quoted` are quoted."""
        plain_start, quoted_start = (_text(facts, kind) for kind in (False, True))
        lines = [f"{plain_start}{t},{p}{v!r}\n" for t, p, v in zip(targets, self._plain, values)]
        for n in quoted:
            lines[n] = f'{quoted_start}"{targets[n]}",{self._quoted[n]}"{values[n]!r}"\n'
        return "".join(line for line, value in zip(lines, values) if value == value)


def _text(cells: Sequence[Any], quoted: bool) -> str:
    """Cells as the beginning of a row of CSV, with a comma behind each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerow([*cells, ""])
    return text.getvalue().removesuffix('""\n' if quoted else "\n")


def has_pyarrow() -> bool:
    """Whether pyarrow, which reads and writes Parquet files, is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_score_parquet(path: Path, split: str, pairs: Pairs, blocks: Iterable[ScoreBlock]) -> None:
    """Write `scores.parquet`: the rows of `scores.csv`, typed, and with texts as they are; needs pyarrow."""
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    types = dict.fromkeys(SCORES, pyarrow.int64()) | dict.fromkeys(("split", "name", "explainer", "metric"), text)
    schema = pyarrow.schema((types | {"value": pyarrow.float64()}).items())
    with written_atomically(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for block in blocks:
            writer.write_table(pyarrow.table(dict(_columns(split, pairs, block)), schema=schema))


def _columns(split: str, pairs: Pairs, block: ScoreBlock) -> Iterator[tuple[str, Any]]:
    """The columns of a block's rows, by sample and then by pair."""
    import pyarrow

    sample, pair = np.nonzero(~np.isnan(block.values.T))
    repeated = {
        "split": (np.zeros(len(sample), dtype=np.int32), [split]),
        "name": (sample.astype(np.int32), list(block.names)),
        "explainer": (pair.astype(np.int32), [explainer for explainer, _ in pairs]),
        "metric": (pair.astype(np.int32), [metric for _, metric in pairs]),
    }
    yield "index", block.index[sample]
    yield "label", block.label[sample]
    yield "target", block.targets[pair, sample]
    yield "value", block.values[pair, sample]
    for name, (numbers, texts) in repeated.items():
        # A name that is not valid UTF-8 has lone surrogates, which Parquet cannot hold.
        safe = [text.encode(errors="backslashreplace").decode() for text in texts]
        distinct = list(dict.fromkeys(safe))
        places = {text: number for number, text in enumerate(distinct)}
        codes = np.array([places[text] for text in safe], dtype=np.int32)
        yield name, pyarrow.DictionaryArray.from_arrays(codes[numbers], pyarrow.array(distinct, pyarrow.string()))
