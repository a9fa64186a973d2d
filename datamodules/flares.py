"""Flare labels: tables of frames with the largest flare class of the next 24 hours, and the frames' dates."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from datamodules.files import Array

FLAGS = ("none", "C", "M", "X")
POSITIVE = 2  # from this flag on: a flare of class M or above
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-._/]?)([01]\d)\2([0-3]\d)(?=\D|$|\d{4,6}(?!\d))")


@dataclass(frozen=True)
class Frame:
    """One row of a label table: the frame's name, its flag (an index of FLAGS), its date where a column gives it."""

    name: str
    flag: int
    day: date | None


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
        ValueError: a column is missing, a flag is not an integer from 0 to 3, or a time column holds no date.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Label file {path} does not exist.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = [name.strip() for name in reader.fieldnames or []]
        for argument, column in (("image", columns.image), ("flag", columns.flag), ("time", columns.time)):
            if column is not None and column not in header:
                raise ValueError(f"{path} has no column '{column}' (columns.{argument}); it has {', '.join(header)}.")
        reader.fieldnames = header
        return [_frame(row, columns, f"{path}, line {line}") for line, row in enumerate(reader, start=2)]


def _frame(row: dict[str, str], columns: Columns, where: str) -> Frame:
    name, flag = ((row[column] or "").strip() for column in (columns.image, columns.flag))
    if flag not in {"0", "1", "2", "3"}:
        raise ValueError(f"{where}: flag '{flag}' of '{name}' must be 0 (none), 1 (C), 2 (M) or 3 (X).")
    if columns.time is None:
        return Frame(name, int(flag), None)
    day = date_in(row[columns.time] or "")
    if day is None:
        raise ValueError(f"{where}: column '{columns.time}' holds '{row[columns.time]}', which has no date.")
    return Frame(name, int(flag), day)


def day_numbers(days: Sequence[date | None], frames_per_day: int) -> Array:
    """(N,) int64, the same for all frames of a day: its ordinal number, the blocks of the bootstrap.

    Where no frame has a date, every `frames_per_day` consecutive frames count as a day.
    """
    if any(day is None for day in days):
        return np.arange(len(days), dtype=np.int64) // frames_per_day
    return np.array([day.toordinal() for day in days if day is not None], dtype=np.int64)
