"""Read a results folder: tables, curves, manifest and the cards of the gallery."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from labn.errors import InputError, MissingFileError
from labn.io.readers import TableRow, read_arrays, read_json, read_table
from labn.results.tables import PAIRED, RANKS, SUMMARY

Card = dict[str, Any]
"""Record of one sample in the gallery, see `labn.report.cards.make_card`."""
CARDS = "cards.json"


@dataclass
class Total:
    """Totals of one column of scores.

    Attributes:
        count: number of samples with a value.
        sum: sum of the values.
        groups: groups of these samples; empty if samples are independent.
    """

    count: int = 0
    sum: float = 0.0
    groups: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class StageResults:
    """Content of a results folder `<run_dir>/<stage>/`; fields of files that do not exist are empty.

    Attributes:
        folder: the results folder.
        scores: (explainer, metric) -> sample index -> value, as in `scores.csv`, of the requested samples.
        totals: (explainer, metric) -> count, sum and groups over all samples.
        names: sample index -> name, of the requested samples.
        groups: sample index -> group, for samples that are not independent; None if they are independent.
        summary: rows of `summary.csv`.
        paired: rows of `paired.csv`.
        ranks: rows of `ranks.csv`.
        curves: arrays of `curves.npz`; with groups also `<explainer>/<metric>/group`, (n,) int64.
        manifest: arguments of the explainers, settings, hashes and versions.
        cards: records of the gallery.
        scratch_dir: folder for memory-mapped copies of large arrays; None keeps them in memory.
    """

    folder: Path
    scores: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    totals: dict[tuple[str, str], Total] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    groups: dict[int, int] | None = None
    summary: list[dict[str, str]] = field(default_factory=list)
    paired: list[dict[str, str]] = field(default_factory=list)
    ranks: list[dict[str, str]] = field(default_factory=list)
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
        """The quantity of the insertion and deletion curves: `probability` (softmax or sigmoid) or `logit`."""
        return "logit" if self.manifest.get("settings", {}).get("probability") == "logit" else "probability"

    @property
    def headline(self) -> list[str]:
        """Names of the requested values, then `fill_probability`."""
        asked = [*self.manifest.get("metrics", self.value_names), "fill_probability"]
        return [name for name in dict.fromkeys(asked) if name in self.value_names]


def read_stage(folder: Path, samples: Collection[int] | None = None, scratch_dir: Path | None = None) -> StageResults:
    """Read a results folder.

    Args:
        folder: the results folder.
        samples: indices of the samples whose scores and names are kept; None keeps all (about 100 bytes per score).
        scratch_dir: folder for memory-mapped copies of the curves; None keeps them in memory.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: a file in it is damaged; the message names the file and the line.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a results folder; run `test` or `validate` first.")
    results = StageResults(folder, groups=_groups(folder / "predictions.csv"), scratch_dir=scratch_dir)
    for row in _lines(folder / "scores.csv", ("index", "name", "explainer", "metric", "value")):
        _keep(results, row, samples)
    return replace(
        results,
        summary=[line.cells for line in _lines(folder / "summary.csv", SUMMARY)],
        # Results of version 0.1 have no p-values.
        paired=[line.cells for line in _lines(folder / "paired.csv", PAIRED[: PAIRED.index("p")])],
        ranks=[line.cells for line in _lines(folder / "ranks.csv", RANKS)],
        curves=_with_groups(folder / "curves.npz", results.groups, scratch_dir),
        manifest=_json(folder / "maps" / "manifest.json", {}),
        cards=_json(folder / CARDS, []),
    )


def _keep(results: StageResults, row: TableRow, samples: Collection[int] | None) -> None:
    """Add a row of `scores.csv` to the totals, and keep its value if its sample is requested."""
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
    # The totals above count every row, whichever samples are kept.
    if samples is None or index in samples:
        column[index] = value
        results.names[index] = row["name"]


def _lines(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    return read_table(path, columns, escaped=True) if path.exists() else iter(())


def _groups(path: Path) -> dict[int, int] | None:
    """Sample index -> group from `predictions.csv`; None if it has no column `group`."""
    # np.int64 raises for numbers that do not fit into the int64 arrays of groups.
    rows = (row for row in _lines(path, ("index",)) if "group" in row.cells)
    return {row.number("index", int): int(row.number("group", np.int64)) for row in rows} or None


def _with_groups(path: Path, groups: dict[int, int] | None, scratch_dir: Path | None) -> dict[str, np.ndarray]:
    """The arrays of `curves.npz`, with an array `<explainer>/<metric>/group` per curve if samples have groups."""
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
