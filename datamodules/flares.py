"""Flare labels: tables of frames with the largest flare class of the next 24 hours, and the frames' dates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from datamodules.files import Array
from labn.reading import Line, read_rows, read_table

FLAGS = ("none", "C", "M", "X")
POSITIVE = 2  # from this flag on: a flare of class M or above
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-._/]?)([01]\d)\2([0-3]\d)(?=\D|$|\d{4,6}(?!\d))")


@dataclass(frozen=True)
class Frame:
    """One row of a label table.

    Attributes:
        name: of the frame.
        flag: an index of FLAGS.
        day: its date, where a column gives it.
        where: file and line.
    """

    name: str
    flag: int
    day: date | None
    where: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a label table.

    Attributes:
        image: name of the frame, a file name where the frames are files.
        flag: 0 (none, A or B), 1 (C), 2 (M) or 3 (X): the largest flare within 24 hours.
        time: date of the frame; None reads it from the frame's name (or FITS header).
    """

    image: str = "image"
    flag: str = "flag"
    time: str | None = None


def date_in(text: str) -> date | None:
    """The first calendar date in a text such as `hmi.m_720s.20140501_120000` or `2014.05.01_12:00`; None without."""
    for match in _DATE.finditer(text):
        year, month, day = (int(match[group]) for group in (1, 3, 4))
        try:
            return date(year, month, day)
        except ValueError:
            continue
    return None


def read_flares(path: Path, columns: Columns) -> list[Frame]:
    """The rows of a label table, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a flag is not an integer from 0 to 3, a time column holds no date, or a frame
            has two rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Label file {path} does not exist.")
    header = next(read_rows(path), (1, []))[1]
    for argument, column in (("image", columns.image), ("flag", columns.flag), ("time", columns.time)):
        if column is not None and column not in header:
            raise ValueError(f"{path} has no column '{column}' (columns.{argument}); it has {', '.join(header)}.")
    frames: dict[str, Frame] = {}
    for row in read_table(path):
        frame = _frame(row, columns)
        if frame.name in frames:
            raise ValueError(
                f"{frame.where}: {frame.name!r} has a row already ({frames[frame.name].where}); every frame needs "
                "exactly one."
            )
        frames[frame.name] = frame
    return list(frames.values())


def _frame(row: Line, columns: Columns) -> Frame:
    name, flag, where = row[columns.image], row[columns.flag], row.where
    if flag not in {"0", "1", "2", "3"}:
        raise ValueError(f"{where}: flag {flag!r} of {name!r} must be 0 (none), 1 (C), 2 (M) or 3 (X).")
    if columns.time is None:
        return Frame(name, int(flag), None, where)
    day = date_in(row[columns.time])
    if day is None:
        raise ValueError(f"{where}: column '{columns.time}' holds {row[columns.time]!r}, which has no date.")
    return Frame(name, int(flag), day, where)


def day_numbers(days: Sequence[date | None], frames_per_day: int) -> Array:
    """(N,) int64, the same for all frames of a day: its ordinal number, the blocks of the bootstrap.

    Where no frame has a date, every `frames_per_day` consecutive frames count as a day.
    """
    if any(day is None for day in days):
        return np.arange(len(days), dtype=np.int64) // frames_per_day
    return np.array([day.toordinal() for day in days if day is not None], dtype=np.int64)
