"""Magnetogram: full-disk solar frames with the largest flare of the next 24 hours as label (the DeFN data)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.base import SPLITS, ImageDataModule, OnBadImage, Split, data_root
from datamodules.io.solar_frames import PictureSource, Preparation, YearSource, check_frames, frame_error
from datamodules.io.sources import Record, Source
from datamodules.io.splits import readable_records
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.fits import is_fits, read_header, required_keyword
from labn.io.images import Array, BadImageError
from labn.io.readers import TableRow, path_inside, read_rows, read_table

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


def find_date(text: str) -> date | None:
    """The first calendar date in a text such as `hmi.m_720s.20140501_120000` or `2014.05.01_12:00`; None without."""
    for match in _DATE.finditer(text):
        year, month, day = (int(match[group]) for group in (1, 3, 4))
        try:
            return date(year, month, day)
        except ValueError:
            continue
    return None


def read_flare_table(path: Path, columns: Columns) -> list[Frame]:
    """The rows of a label table, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a flag is not an integer from 0 to 3, a time column holds no date, or a frame
            has two rows.
    """
    if not path.is_file():
        raise MissingFileError(f"Label file {path} does not exist.")
    header = next(read_rows(path), (1, []))[1]
    for argument, column in (("image", columns.image), ("flag", columns.flag), ("time", columns.time)):
        if column is not None and column not in header:
            raise InputError(f"{path} has no column '{column}' (columns.{argument}); it has {', '.join(header)}.")
    frames: dict[str, Frame] = {}
    for row in read_table(path):
        frame = _frame(row, columns)
        if frame.name in frames:
            raise InputError(
                f"{frame.where}: {frame.name!r} has a row already ({frames[frame.name].where}); every frame needs "
                "exactly one."
            )
        frames[frame.name] = frame
    return list(frames.values())


def _frame(row: TableRow, columns: Columns) -> Frame:
    name, flag, where = row[columns.image], row[columns.flag], row.where
    if flag not in {"0", "1", "2", "3"}:
        raise InputError(f"{where}: flag {flag!r} of {name!r} must be 0 (none), 1 (C), 2 (M) or 3 (X).")
    if columns.time is None:
        return Frame(name, int(flag), None, where)
    day = find_date(row[columns.time])
    if day is None:
        raise InputError(f"{where}: column '{columns.time}' holds {row[columns.time]!r}, which has no date.")
    return Frame(name, int(flag), day, where)


def day_numbers(days: Sequence[date | None], frames_per_day: int) -> Array:
    """(N,) int64, the same for all frames of a day: its ordinal number, the blocks of the bootstrap.

    Where no frame has a date, every `frames_per_day` consecutive frames count as a day.
    """
    if any(day is None for day in days):
        return np.arange(len(days), dtype=np.int64) // frames_per_day
    return np.array([day.toordinal() for day in days if day is not None], dtype=np.int64)


class Magnetogram(ImageDataModule):
    """Solar frames in grey, split by years, in one of two layouts.

    - Memory maps (the layout of DeFN, Nishizuka et al. 2018): `root/{year}.npy`, (n,H,W) uint8, with `root/{year}.csv`,
      one row per frame in the same order. A frame is read when it is needed; memory stays flat for any n.
    - Pictures: with `labels`, that CSV file has one row per PNG, JPEG or FITS file of `pictures`.

    The flag of a frame is the class of the largest flare in the 24 hours after it: 0 none (or A, B), 1 C, 2 M, 3 X.
    Hourly frames are alike: batches carry the day as `group`, and intervals draw whole days.

    Args:
        root: the folder; None for `$LABN_DATA/magnetogram`.
        labels: CSV file of the picture layout, seen from `root`; None for the layout of memory maps.
        pictures: folder of the pictures, seen from `root`.
        columns: names of the CSV columns.
        fits_time: keyword of a FITS header that holds the date, where no time column does.
        frames_per_day: consecutive frames that count as a day where neither column nor name has a date.
        train_years: years of the training split.
        val_years: of validation.
        test_years: of the test. A year that is in none of the three is left out.
        task: "binary" (below M against M or above) or "classes" (none, C, M, X).
        image_size: side in pixels; frames of another size are squashed.
        caption: share of the height at the bottom that is painted black, for pictures with a line of text there.
        fits_range: physical values of FITS images (gauss) that become black and white; undefined pixels become black.
        mean: one number, of values in [0,1]; None: computed from the training split and cached.
        std: likewise.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        seed: of the training order and the augmentation.
        balanced_sampler: class-balanced batches.
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; the papers' by default, None for none.
        on_bad_image: "stop" or "skip".
        cache_images: keep decoded images in memory.
        cache_dir: folder of the bias image and of computed statistics.

    Raises:
        FileNotFoundError: a folder, label file, year or picture is missing (when the data is first needed, as below).
        ValueError: a year in two splits, `.npy` and `.csv` of different length, another type or shape than (n,H,W)
            uint8, a flag outside 0-3, a missing column or FITS keyword, no positive frame in a split, a bad picture.
    """

    channels = 1

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        labels: str | None = None,
        pictures: str = ".",
        columns: Columns = Columns(),
        fits_time: str = "DATE-OBS",
        frames_per_day: int = 24,
        train_years: list[int] = [2010, 2011, 2012, 2013, 2014, 2015],  # noqa: B006 (read only)
        val_years: list[int] = [2016],  # noqa: B006 (read only)
        test_years: list[int] = [2017],  # noqa: B006 (read only)
        task: Literal["binary", "classes"] = "binary",
        image_size: int = 512,
        caption: float = 0.0,
        fits_range: tuple[float, float] = (-1500.0, 1500.0),
        mean: list[float] | None = [0.3625],  # noqa: B006 (read only)
        std: list[float] | None = [0.2234],  # noqa: B006 (read only)
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = PUBLISHED,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            image_size,
            mean,
            std,
            batch_size,
            num_workers,
            seed,
            balanced_sampler,
            drop_last,
            augmentation,
            on_bad_image,
            cache_images,
            cache_dir,
        )
        if task not in ("binary", "classes"):
            raise InputError(f"task is {task!r}; it must be 'binary' or 'classes'.")
        if not 0.0 <= caption < 1.0:
            raise InputError(f"caption is {caption}; it is a share of the height, from 0 to below 1.")
        if not fits_range[0] < fits_range[1]:
            raise InputError(f"fits_range is {fits_range}; its first value must be below its second.")
        self.root, self.labels_file, self.pictures, self.columns = root, labels, pictures, columns
        self.fits_time, self.frames_per_day, self.task = fits_time, frames_per_day, task
        self.years = check_years({"train": train_years, "val": val_years, "test": test_years})
        self.caption, self.fits_range = caption, (fits_range[0], fits_range[1])
        self.preparation = Preparation(image_size, caption, self.fits_range)
        self.class_names = ["below M", "M or above"] if task == "binary" else list(FLAGS)
        self.positive_classes = (1,) if task == "binary" else (2, 3)

    def _build(self) -> dict[Split, Source]:
        root = data_root("magnetogram", self.root)
        self._notes = []
        sources = self._from_years(root) if self.labels_file is None else self._from_pictures(root)
        for split, source in sources.items():
            if not np.isin(source.labels, self.positive_classes).any():
                raise InputError(
                    f"{root}: split {split} has no frame of class M or above among {len(source)} "
                    f"(years {', '.join(map(str, self.years[split]))}); give {split}_years a year that has some."
                )
        return sources

    def _classes(self, frames: Sequence[Frame]) -> np.ndarray[Any, Any]:
        flags = np.array([frame.flag for frame in frames], dtype=np.int64)
        return (flags >= POSITIVE).astype(np.int64) if self.task == "binary" else flags

    def _from_years(self, root: Path) -> dict[Split, Source]:
        return {split: self._years(root, self.years[split]) for split in SPLITS}

    def _years(self, root: Path, years: Sequence[int]) -> YearSource:
        files = [root / f"{year}.npy" for year in years]
        tables = [read_flare_table(file.with_suffix(".csv"), self.columns) for file in files]
        for file, table in zip(files, tables):
            check_frames(file, len(table))
        rows = [(number, row) for number, table in enumerate(tables) for row in range(len(table))]
        frames = [frame for table in tables for frame in table]
        names = [f"{files[number].stem}/{frame.name}" for (number, _), frame in zip(rows, frames)]
        days = self._days([frame.day or find_date(frame.name) for frame in frames], f"{', '.join(map(str, years))}")
        return YearSource(files, np.array(rows), names, self._classes(frames), days, self.preparation)

    def _days(self, days: Sequence[date | None], where: str) -> np.ndarray[Any, Any]:
        if any(day is None for day in days):
            self._notes.append(f"  no dates in {where}: {self.frames_per_day} consecutive frames count as a day")
        return day_numbers(days, self.frames_per_day)

    def _from_pictures(self, root: Path) -> dict[Split, Source]:
        table = root / str(self.labels_file)
        folder = root / self.pictures
        frames = read_flare_table(table, self.columns)
        paths = [path_inside(folder, frame.name, frame.where) for frame in frames]
        records = [Record(f.name, int(c), path) for f, c, path in zip(frames, self._classes(frames), paths)]
        for record, frame in zip(records, frames):
            if not record.path.is_file():
                raise MissingFileError(f"{frame.where}: {folder} has no picture {record.name!r}.")
        good, notes = readable_records(records, self.on_bad_image, [root, folder], frame_error)
        self._notes += notes
        known = {frame.name: frame.day for frame in frames}
        days = {record.name: known[record.name] or self._date(record.path) for record in good}
        return {split: self._pictures(split, good, days, table) for split in SPLITS}

    def _pictures(self, split: Split, records: Sequence[Record], days: dict[str, date], table: Path) -> PictureSource:
        for year in self.years[split]:
            if not any(day.year == year for day in days.values()):
                raise InputError(f"{table} has no picture of {year}, which {split}_years names.")
        chosen = [record for record in records if days[record.name].year in self.years[split]]
        groups = np.array([days[record.name].toordinal() for record in chosen], dtype=np.int64)
        return PictureSource(chosen, groups, self.preparation)

    def _date(self, path: Path) -> date:
        """Date of a picture that has none in the table: from the FITS header, else from the file's name."""
        text = path.name
        if is_fits(path):
            text = str(required_keyword(read_header(path)[0], self.fits_time, path))
        found = find_date(text)
        if found is None:
            raise BadImageError(f"Image {path} has no date in '{text}'; name a column with it (columns.time).")
        return found


def check_years(years: dict[Split, list[int]]) -> dict[Split, list[int]]:
    """The years of the splits, sorted.

    Raises:
        ValueError: a year is in two splits or twice in one, or a split has none.
    """
    seen: dict[int, str] = {}
    for split, chosen in years.items():
        if not chosen:
            raise InputError(f"{split}_years is empty; every split needs a year.")
        for year in chosen:
            if year in seen:
                raise InputError(f"Year {year} is in {seen[year]}_years and in {split}_years; give it to one split.")
            seen[year] = split
    return {split: sorted(chosen) for split, chosen in years.items()}
