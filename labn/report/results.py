"""A results folder read back: tables, curves, what made them, and the gallery's cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from labn.reading import Line, read_arrays, read_json, read_table
from labn.report.cards import Card
from labn.results import PAIRED, SUMMARY

CARDS = "cards.json"


@dataclass(frozen=True)
class StageResults:
    """What lies in `<run_dir>/<stage>/`; parts that a run did not write are empty.

    Attributes:
        folder: the stage's folder.
        scores: (explainer, metric) -> sample index -> value, as in `scores.csv`.
        names: sample index -> name.
        groups: sample index -> group, where samples are not independent; None where they are.
        summary: rows of `summary.csv`.
        paired: rows of `paired.csv`.
        curves: arrays of `curves.npz`; with groups also `<explainer>/<metric>/group`, (n,) int64.
        manifest: explainer arguments, settings, hashes and versions.
        cards: records of the gallery.
    """

    folder: Path
    scores: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    groups: dict[int, int] | None = None
    summary: list[dict[str, str]] = field(default_factory=list)
    paired: list[dict[str, str]] = field(default_factory=list)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    cards: list[Card] = field(default_factory=list)

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
    def headline(self) -> list[str]:
        """The values that were asked for by name, then the probability of the bare fill."""
        asked = [*self.manifest.get("metrics", self.value_names), "fill_probability"]
        return [name for name in dict.fromkeys(asked) if name in self.value_names]


def read_stage(folder: Path) -> StageResults:
    """Read a results folder.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a file in it is damaged; the message names it and the line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a results folder; run `test` or `validate` first.")
    scores: dict[tuple[str, str], dict[int, float]] = {}
    names: dict[int, str] = {}
    for row in _lines(folder / "scores.csv", ("index", "name", "explainer", "metric", "value")):
        index = row.number("index", int)
        scores.setdefault((row["explainer"], row["metric"]), {})[index] = row.number("value", float)
        names[index] = row["name"]
    groups = _groups(folder / "predictions.csv", names)
    return StageResults(
        folder=folder,
        scores=scores,
        names=names,
        groups=groups,
        summary=[line.cells for line in _lines(folder / "summary.csv", SUMMARY)],
        paired=[line.cells for line in _lines(folder / "paired.csv", PAIRED)],
        curves=_with_groups(folder / "curves.npz", groups),
        manifest=_json(folder / "maps" / "manifest.json", {}),
        cards=_json(folder / CARDS, []),
    )


def _lines(path: Path, columns: Sequence[str]) -> Iterator[Line]:
    return read_table(path, columns) if path.exists() else iter(())


def _groups(path: Path, names: dict[int, str]) -> dict[int, int] | None:
    """Sample index -> group from `predictions.csv`; None where it has no such column."""
    rows = [row for row in _lines(path, ("index",)) if "group" in row.cells]
    if not rows:
        return None
    # The kind int64 refuses what no array of groups could hold.
    groups = {row.number("index", int): int(row.number("group", np.int64)) for row in rows}
    for index, name in names.items():
        if index not in groups:
            raise ValueError(f"{path} has no group for {name} (index {index}), which scores.csv has; test again.")
    return groups


def _with_groups(path: Path, groups: dict[int, int] | None) -> dict[str, np.ndarray]:
    arrays = read_arrays(path) if path.exists() else {}
    if groups is None:
        return arrays
    for key in [name.removesuffix("/index") for name in arrays if name.endswith("/index")]:
        drawn = [groups.get(index) for index in arrays[f"{key}/index"].ravel().tolist()]
        if None in drawn:
            raise ValueError(
                f"{path} has a curve of {key} for a sample that predictions.csv has no group for; test again."
            )
        arrays[f"{key}/group"] = np.array(drawn, dtype=np.int64)
    return arrays


def _json(path: Path, default: Any) -> Any:
    return read_json(path, type(default)) if path.exists() else default
