"""Training curves from the CSV logs of a run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from labn.reading import read_table
from labn.report.charts import Panel, Series

STAGES = ("train", "val")
ELSEWHERE = ("test", "profile")
"""Logged groups that are no curve over epochs."""


def log_files(run_dir: Path, command: str) -> list[Path]:
    """The CSV logs of a command, oldest first: `logs/fit/metrics.csv`, then those of `fit-1`, `fit-2`, ..."""
    found = {}
    for path in (run_dir / "logs").glob(f"{command}*/metrics.csv"):
        if match := re.fullmatch(rf"{command}(?:-(\d+))?", path.parent.name):
            found[int(match[1] or 0)] = path
    return [found[number] for number in sorted(found)]


def read_training(run_dir: Path, before: int | None = None) -> dict[str, dict[int, float]]:
    """Logged value -> epoch -> its last value in it, over all `fit` logs of the run (a resumed run has several).

    Empty where the run has no CSV log.

    Args:
        run_dir: the run folder.
        before: leave this epoch and later ones out, which an attempt that was killed may have begun; None: take all.
    """
    values: dict[str, dict[int, float]] = {}
    # Of a resumed fit later logs win.
    for path in log_files(run_dir, "fit"):
        rows = list(read_table(path))
        # What follows the last line break is the row that a killed process was writing.
        for row in rows if path.read_bytes().endswith(b"\n") else rows[:-1]:
            for name, text in row.cells.items():
                if text and "/" in name and row.cells.get("epoch"):
                    epoch = row.number("epoch", int)
                    if before is None or epoch < before:
                        values.setdefault(name, {})[epoch] = row.number(name, float)
    return {name: dict(sorted(epochs.items())) for name, epochs in values.items()}


def training_panels(values: Mapping[str, Mapping[int, float]]) -> list[Panel]:
    """One panel per quantity; a line keeps its colour in all of them (`train`, `val`, `val/<explainer>`).

    What is logged under another group, such as `gate/train_open`, shares the panel of that group.
    """
    panels: dict[str, list[Series]] = {}
    places: dict[str, int] = {}
    for name, epochs in sorted(values.items(), key=lambda item: item[0].split("/")):
        group, *middle, quantity = name.split("/")
        if group in ELSEWHERE:
            continue
        panel, line = (quantity, "/".join([group, *middle])) if group in STAGES else (group, quantity)
        x, y = np.array(list(epochs), dtype=float), np.array(list(epochs.values()))
        panels.setdefault(panel, []).append(Series(line, places.setdefault(line, len(places)), x, y))
    return [Panel(n, "epoch", n, tuple(lines), whole=True) for n, lines in sorted(panels.items(), key=_importance)]


def _importance(item: tuple[str, list[Series]]) -> tuple[int, str]:
    first = ("loss", "accuracy")
    return (first.index(item[0]) if item[0] in first else len(first), item[0])
