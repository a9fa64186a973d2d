"""Experiment trackers behind one interface: Weights & Biases, TensorBoard and MLflow take pictures and tables alike."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from labn.errors import without_credentials
from labn.io.table_cells import csv_bytes

Row = Sequence[Any]
"""Cells of a table: numbers, text, None, or pictures."""
Kind = TypeVar("Kind", bound=Logger)


class Tracker(ABC, Generic[Kind]):
    """What this project logs besides numbers, which Lightning gives to every logger itself.

    All calls are made by rank zero, and may raise whatever the tracker's package raises.

    Args:
        logger: one of `trainer.loggers`.
    """

    name: ClassVar[str]

    def __init__(self, logger: Kind) -> None:
        self.logger = logger

    @abstractmethod
    def log_pictures(self, key: str, pictures: Mapping[str, Image.Image], step: int) -> None:
        """Log pictures under a key such as `maps/test`.

        Args:
            key: the key, the same in every epoch.
            pictures: caption -> picture.
            step: the trainer's global step.
        """

    @abstractmethod
    def log_table(self, key: str, header: Sequence[str], rows: Sequence[Row], step: int) -> None:
        """Log a table under a key such as `samples/test`; each row has one cell per column."""

    def where(self) -> str:
        """What to do to see the results, as a line for the terminal; empty if there is nothing to say."""
        return ""


class WandbTracker(Tracker[WandbLogger]):
    """Weights & Biases: panels of pictures, and a table whose cells may be pictures."""

    name = "Weights & Biases"

    def log_pictures(self, key: str, pictures: Mapping[str, Image.Image], step: int) -> None:
        """One panel per key; Weights & Biases counts its own steps."""
        self.logger.log_image(key, list(pictures.values()), caption=list(pictures))

    def log_table(self, key: str, header: Sequence[str], rows: Sequence[Row], step: int) -> None:
        """A table with pictures in it; its key can be written only once per run."""
        import wandb  # imported here, because it is slow to import and not needed when logging is disabled

        cells = [[wandb.Image(c) if isinstance(c, Image.Image) else c for c in row] for row in rows]
        self.logger.log_table(key, list(header), cells)

    def where(self) -> str:
        """Where an offline run is, and the command that uploads it."""
        if getattr(self.logger, "lost", False) or not self.logger._offline:
            return ""
        folder = getattr(getattr(self.logger.experiment, "settings", None), "sync_dir", None)
        return "offline run" + ("" if folder is None else f"; to upload it: wandb sync {folder}")


class TensorBoardTracker(Tracker[TensorBoardLogger]):
    """TensorBoard: one image series per picture, and tables as Markdown without their pictures."""

    name = "TensorBoard"

    def log_pictures(self, key: str, pictures: Mapping[str, Image.Image], step: int) -> None:
        """Pictures under `<key>/<caption>`, so that one slider goes through the epochs."""
        for caption, picture in pictures.items():
            tag = f"{key}/{caption}" if caption else key
            self.logger.experiment.add_image(tag, np.asarray(picture), step, dataformats="HWC")
        self.logger.experiment.flush()

    def log_table(self, key: str, header: Sequence[str], rows: Sequence[Row], step: int) -> None:
        """A text of Markdown; pictures are left out, because they stand under their own key."""
        self.logger.experiment.add_text(key, markdown(header, rows), step)
        self.logger.experiment.flush()

    def where(self) -> str:
        """The command that shows the log."""
        return f"tensorboard --logdir {self.logger.root_dir}"


class MLflowTracker(Tracker[MLFlowLogger]):
    """MLflow: pictures and tables as artifacts of the run, `<key>/step=<step>/<caption>.png` and `<key>.csv`."""

    name = "MLflow"

    def log_pictures(self, key: str, pictures: Mapping[str, Image.Image], step: int) -> None:
        """One PNG per picture."""
        for caption, picture in pictures.items():
            file = "/".join(part for part in (key, f"step={step:06d}", file_name(caption)) if part)
            self.logger.experiment.log_image(self.logger.run_id, picture, artifact_file=f"{file}.png")

    def log_table(self, key: str, header: Sequence[str], rows: Sequence[Row], step: int) -> None:
        """A CSV file; pictures are left out, because they stand under their own key."""
        kept = without_pictures(header, rows)
        text = csv_bytes(*kept).decode()
        self.logger.experiment.log_text(self.logger.run_id, text, f"{key}.csv")

    def where(self) -> str:
        """The run and its store."""
        return without_credentials(f"run {self.logger.run_id} in {self.logger._tracking_uri}")


TRACKERS: tuple[tuple[type[Logger], type[Tracker[Any]]], ...] = (
    (WandbLogger, WandbTracker),
    (TensorBoardLogger, TensorBoardTracker),
    (MLFlowLogger, MLflowTracker),
)


def trackers_of(loggers: Sequence[Logger]) -> list[Tracker[Any]]:
    """The trackers among the loggers of a trainer; loggers of numbers alone, such as CSV files, are left out."""
    return [tracker(logger) for logger in loggers for kind, tracker in TRACKERS if isinstance(logger, kind)]


def without_pictures(header: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """A table without the columns that hold pictures."""
    kept = [n for n in range(len(header)) if not any(isinstance(row[n], Image.Image) for row in rows)]
    return [header[n] for n in kept], [[row[n] for n in kept] for row in rows]


def markdown(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A table as Markdown, without its pictures.

    Example:
        >>> print(markdown(["name", "pid16"], [["a|b", 0.25], ["c", None]]))
        | name | pid16 |
        |---|---|
        | a\\|b | 0.25 |
        | c |  |
    """
    names, cells = without_pictures(header, rows)
    lines = [names, *([_cell(value) for value in row] for row in cells)]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(names), *texts[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    # Names come from files: a bar would end the cell, and a tag would reach the page that shows the text.
    escaped = str("" if value is None else value).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"\s+", " ", escaped)


def file_name(caption: str) -> str:
    """A caption as the name of a file."""
    return re.sub(r"[^\w.=-]+", "_", caption)
