"""The CSV logs of training in a run folder."""

from __future__ import annotations

import re
from pathlib import Path

from labn.io.readers import read_table

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
