"""Read the CSV logs of a run folder."""

from __future__ import annotations

import re
from pathlib import Path

from labn.io.readers import read_table

STAGES = ("train", "val")

ELSEWHERE = ("test", "profile")
"""Groups of logged values that are not curves over epochs."""


def log_files(run_dir: Path, command: str) -> list[Path]:
    """The CSV logs of a command, oldest first: `logs/fit/metrics.csv`, then those of `fit-1`, `fit-2`, ..."""
    paths = {}
    for path in (run_dir / "logs").glob(f"{command}*/metrics.csv"):
        if match := re.fullmatch(rf"{command}(?:-(\d+))?", path.parent.name):
            paths[int(match[1] or 0)] = path
    # By number: a sort of names would put fit-10 before fit-2.
    return [paths[number] for number in sorted(paths)]


def read_training(run_dir: Path, before: int | None = None) -> dict[str, dict[int, float]]:
    """Name of a logged value -> epoch -> last value in that epoch, over all `fit` logs of the run.

    A resumed run has several logs. The result is empty if the run has none.

    Args:
        run_dir: the run folder.
        before: leave out this and later epochs, which a killed attempt may have started; None takes all epochs.
    """
    values: dict[str, dict[int, float]] = {}
    # Oldest first, so that the log of a resumed fit replaces the epochs that it repeats.
    for path in log_files(run_dir, "fit"):
        rows = list(read_table(path, escaped=True))
        # A row without a line break at its end is incomplete: its process was killed while writing.
        for row in rows if path.read_bytes().endswith(b"\n") else rows[:-1]:
            for name, text in row.cells.items():
                if text and "/" in name and row.cells.get("epoch"):
                    epoch = row.number("epoch", int)
                    if before is None or epoch < before:
                        values.setdefault(name, {})[epoch] = row.number(name, float)
    return {name: dict(sorted(epochs.items())) for name, epochs in values.items()}
