"""A results folder read back: tables, curves, what made them, and the gallery's cards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from labn.errors import InputError, MissingFileError
from labn.io.readers import TableRow, read_arrays, read_json, read_table
from labn.results.tables import PAIRED, SUMMARY

Card = dict[str, Any]
"""What the gallery keeps of one sample, see `labn.report.cards.make_card`."""
CARDS = "cards.json"


@dataclass
class Total:
    """What is known of a column of scores as a whole.

    Attributes:
        count: samples that have a value.
        sum: of their values.
        groups: those that the samples belong to; empty where samples are independent.
    """

    count: int = 0
    sum: float = 0.0
    groups: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class StageResults:
    """What lies in `<run_dir>/<stage>/`; parts that a run did not write are empty.

    Attributes:
        folder: the stage's folder.
        scores: (explainer, metric) -> sample index -> value, as in `scores.csv`, of the samples that were asked for.
        totals: (explainer, metric) -> what is known of the column, over all samples.
        names: sample index -> name, of the samples that were asked for.
        groups: sample index -> group, where samples are not independent; None where they are.
        summary: rows of `summary.csv`.
        paired: rows of `paired.csv`.
        curves: arrays of `curves.npz`; with groups also `<explainer>/<metric>/group`, (n,) int64.
        manifest: explainer arguments, settings, hashes and versions.
        cards: records of the gallery.
        scratch_dir: folder on whose disk large arrays lie meanwhile; None: in memory.
    """

    folder: Path
    scores: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    totals: dict[tuple[str, str], Total] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    groups: dict[int, int] | None = None
    summary: list[dict[str, str]] = field(default_factory=list)
    paired: list[dict[str, str]] = field(default_factory=list)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    cards: list[Card] = field(default_factory=list)
    scratch_dir: Path | None = None

    @property
    def explainers(self) -> list[str]:
        """Names of the explainers, in the order of the tables, else of the cards."""
        scored = [name for name, _ in self.scores]
        return list(dict.fromkeys([*scored, *(name for card in self.cards for name in card["maps"])]))

    @property
    def value_names(self) -> list[str]:
        """Names of all values, in the order of the tables."""
        return list(dict.fromkeys(metric for _, metric in self.scores))

    @property
    def quantity(self) -> str:
        """What insertion and deletion curves hold: `probability`, of whichever kind, or `logit`."""
        return "logit" if self.manifest.get("settings", {}).get("probability") == "logit" else "probability"

    @property
    def headline(self) -> list[str]:
        """The values that were asked for by name, then the probability of the bare fill."""
        asked = [*self.manifest.get("metrics", self.value_names), "fill_probability"]
        return [name for name in dict.fromkeys(asked) if name in self.value_names]


def read_stage(folder: Path, samples: Collection[int] | None = None, scratch_dir: Path | None = None) -> StageResults:
    """Read a results folder.

    Args:
        folder: of the stage.
        samples: those whose scores and names are kept; None keeps all, which takes some 100 bytes per score.
        scratch_dir: a folder on whose disk the curves lie while they are in use; None: in memory.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a file in it is damaged; the message names it and the line.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a results folder; run `test` or `validate` first.")
    results = StageResults(folder, groups=_groups(folder / "predictions.csv"), scratch_dir=scratch_dir)
    for row in _lines(folder / "scores.csv", ("index", "name", "explainer", "metric", "value")):
        _keep(results, row, samples)
    return replace(
        results,
        summary=[line.cells for line in _lines(folder / "summary.csv", SUMMARY)],
        paired=[line.cells for line in _lines(folder / "paired.csv", PAIRED)],
        curves=_with_groups(folder / "curves.npz", results.groups, scratch_dir),
        manifest=_json(folder / "maps" / "manifest.json", {}),
        cards=_json(folder / CARDS, []),
    )


def _keep(results: StageResults, row: TableRow, samples: Collection[int] | None) -> None:
    """Count a row of `scores.csv`, and keep it where its sample is asked for."""
    index, value, key = row.number("index", int), row.number("value", float), (row["explainer"], row["metric"])
    total, column = results.totals.setdefault(key, Total()), results.scores.setdefault(key, {})
    total.count, total.sum = total.count + 1, total.sum + value
    if results.groups is not None:
        if index not in results.groups:
            path = results.folder / "predictions.csv"
            raise InputError(
                f"{path} has no group for {row['name']} (index {index}), which scores.csv has; test again."
            )
        total.groups.add(results.groups[index])
    if samples is None or index in samples:
        column[index] = value
        results.names[index] = row["name"]


def _lines(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    return read_table(path, columns) if path.exists() else iter(())


def _groups(path: Path) -> dict[int, int] | None:
    """Sample index -> group from `predictions.csv`; None where it has no such column."""
    # The kind int64 refuses what no array of groups could hold.
    rows = (row for row in _lines(path, ("index",)) if "group" in row.cells)
    return {row.number("index", int): int(row.number("group", np.int64)) for row in rows} or None


def _with_groups(path: Path, groups: dict[int, int] | None, scratch_dir: Path | None) -> dict[str, np.ndarray]:
    arrays = read_arrays(path, scratch_dir=scratch_dir) if path.exists() else {}
    if groups is None:
        return arrays
    for key in [name.removesuffix("/index") for name in arrays if name.endswith("/index")]:
        drawn = [groups.get(index) for index in arrays[f"{key}/index"].ravel().tolist()]
        if None in drawn:
            raise InputError(
                f"{path} has a curve of {key} for a sample that predictions.csv has no group for; test again."
            )
        arrays[f"{key}/group"] = np.array(drawn, dtype=np.int64)
    return arrays


def _json(path: Path, default: Any) -> Any:
    return read_json(path, type(default)) if path.exists() else default
