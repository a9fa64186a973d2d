"""Magnetogram: full-disk solar images, labelled with the largest flare of the next 24 hours (the DeFN data)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.base import ImageDataModule, data_root
from datamodules.io.solar_frames import PictureSource, Preparation, YearSource, check_frames, frame_error
from datamodules.io.sources import Record, Source
from datamodules.io.splits import SPLITS, Split, readable_records
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.fits import image_header, is_fits, required_keyword
from labn.io.images import Array, BadImageError
from labn.io.readers import TableRow, path_inside, read_rows, read_table

FLAGS = ("none", "C", "M", "X")

FIRST_POSITIVE_FLAG = 2
"""Flags from here on stand for a flare of class M or above."""

# A year from 1900 to 2099, month and day with one and the same separator (or none) between them; the digits of a time
# of day may follow, other digits may not, which keeps counters such as 20140501234 from being read as dates.
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-._/]?)([01]\d)\2([0-3]\d)(?=\D|$|\d{4,6}(?!\d))")


@dataclass(frozen=True)
class Frame:
    """One row of a label table.

    Attributes:
        name: name of the frame.
        flag: class of the largest flare, an index of FLAGS.
        day: date of the frame; None where no column gives it.
        where: file and line of the row, for error messages.
    """

    name: str
    flag: int
    day: date | None
    where: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a label table.

    Attributes:
        image: column with the name of the frame; a file name in the picture layout.
        flag: column with the largest flare within 24 hours: 0 (none, A or B), 1 (C), 2 (M) or 3 (X).
        time: column with the date of the frame; None reads the date from the frame's name or FITS header.

    Example:
        >>> Columns(image="filename", time="timestamp")
        Columns(image='filename', flag='flag', time='timestamp')
    """

    image: str = "image"
    flag: str = "flag"
    time: str | None = None


def find_date(text: str) -> date | None:
    """The first calendar date in a text such as `hmi.m_720s.20140501_120000`; None for a text without a date.

    Example:
        >>> find_date("hmi.m_720s.20140501_120000"), find_date("2014.05.01_12:00"), find_date("frame 17")
        (datetime.date(2014, 5, 1), datetime.date(2014, 5, 1), None)
    """
    for match in _DATE.finditer(text):
        year, month, day = (int(match[group]) for group in (1, 3, 4))
        try:
            return date(year, month, day)
        except ValueError:
            continue
    return None


def read_flare_table(path: Path, columns: Columns) -> list[Frame]:
    """Read the rows of a label table, in order.

    Raises:
        MissingFileError: the file does not exist.
        InputError: a column is missing, a flag is not an integer from 0 to 3, a cell of the time column has no date, or
            a frame has two rows.
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
                f"{frame.where}: {frame.name!r} already has a row ({frames[frame.name].where}); every frame needs "
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
    """Group (N,) int64 of every frame for the bootstrap: the ordinal number of its day.

    If a frame has no date, every `frames_per_day` consecutive frames count as one day.

    Example:
        >>> day_numbers([None] * 5, frames_per_day=2).tolist()
        [0, 0, 1, 1, 2]
    """
    if any(day is None for day in days):
        return np.arange(len(days), dtype=np.int64) // frames_per_day
    return np.array([day.toordinal() for day in days if day is not None], dtype=np.int64)


class Magnetogram(ImageDataModule):
    """Full-disk solar frames in grey, split by years, in one of two layouts.

    - Memory maps (the layout of DeFN, Nishizuka et al. 2018): `root/{year}.npy`, (n,H,W) uint8, with `root/{year}.csv`,
      one row per frame in the same order. Frames are read one by one, so that memory use does not depend on n.
    - Pictures: the CSV file `labels` has one row for each PNG, JPEG or FITS file in the folder `pictures`.

    The label is the class of the largest flare in the 24 hours after the frame: 0 none (or A, B), 1 C, 2 M, 3 X. Frames
    of one day are nearly equal, so batches carry the day as `group`, and confidence intervals resample whole days.

    Args:
        root: the folder; None takes `$LABN_DATA/magnetogram`.
        labels: path of the label file of the picture layout, relative to `root`; None reads memory maps.
        pictures: folder of the pictures, relative to `root`.
        columns: names of the CSV columns.
        fits_time: keyword of the FITS header that holds the date, used where no time column does.
        frames_per_day: number of consecutive frames that count as one day where neither column nor name has a date.
        train_years: years of the training split.
        val_years: years of the validation split.
        test_years: years of the test split. Years in none of the three lists are left out.
        task: "binary" (below M against M or above) or "classes" (none, C, M, X).
        image_size: side in pixels; frames of another size are squashed.
        caption: share of the height that is painted black at the bottom, for pictures with a line of text there.
        fits_range: physical values of FITS images (gauss) that become black and white; undefined pixels become black.
            FITS images are turned so that north is up (CROTA2, PCi_j); compressed ones need astropy.
        mean: mean in a list of one number, for values in [0,1]; None computes it from the training split.
        std: standard deviation in a list of one number, for values in [0,1]; None computes it likewise.
        augmentation: augmentation of the training split; the published one (JSAI 2022) by default.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: a folder, label file, year or picture is missing (raised when the data is first used).
        InputError: an argument is wrong or a year is in two splits (at once); or, when the data is first used, `.npy`
            and `.csv` differ in length, an array is not (n,H,W) uint8, a flag is not in 0-3, a column or FITS keyword
            is missing, a split has no positive frame, or a picture is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for year in (2015, 2016, 2017):
        ...         np.save(f"{folder}/{year}.npy", np.zeros((2, 8, 8), np.uint8))
        ...         table = f"image,flag\\n{year}0101_00,0\\n{year}0102_00,3\\n"
        ...         _ = (Path(folder) / f"{year}.csv").write_text(table)
        ...     data = Magnetogram(folder, train_years=[2015], image_size=8)
        ...     sample = data.dataset("test")[1]
        >>> sample["image"].shape, data.class_names[sample["label"]], date.fromordinal(sample["group"]).isoformat()
        (torch.Size([1, 8, 8]), 'M or above', '2017-01-02')
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
        augmentation: Augmentation | None = PUBLISHED,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, mean, std, augmentation=augmentation, **kwargs)
        if task not in ("binary", "classes"):
            raise InputError(f"task is {task!r}; it must be 'binary' or 'classes'.")
        if not 0.0 <= caption < 1.0:
            raise InputError(f"caption is {caption}; it must be a share of the height, at least 0 and below 1.")
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
        return (flags >= FIRST_POSITIVE_FLAG).astype(np.int64) if self.task == "binary" else flags

    def _from_years(self, root: Path) -> dict[Split, Source]:
        return {split: self._year_source(root, self.years[split]) for split in SPLITS}

    def _year_source(self, root: Path, years: Sequence[int]) -> YearSource:
        files = [root / f"{year}.npy" for year in years]
        tables = [read_flare_table(file.with_suffix(".csv"), self.columns) for file in files]
        for file, table in zip(files, tables):
            check_frames(file, len(table))
        positions = [(number, row) for number, table in enumerate(tables) for row in range(len(table))]
        frames = [frame for table in tables for frame in table]
        names = [f"{files[number].stem}/{frame.name}" for (number, _), frame in zip(positions, frames)]
        days = self._days([frame.day or find_date(frame.name) for frame in frames], f"{', '.join(map(str, years))}")
        return YearSource(files, np.array(positions), names, self._classes(frames), days, self.preparation)

    def _days(self, days: Sequence[date | None], where: str) -> np.ndarray[Any, Any]:
        if any(day is None for day in days):
            self._notes.append(f"  no dates in {where}: {self.frames_per_day} consecutive frames count as a day")
        return day_numbers(days, self.frames_per_day)

    def _from_pictures(self, root: Path) -> dict[Split, Source]:
        table = root / str(self.labels_file)
        folder = root / self.pictures
        frames = read_flare_table(table, self.columns)
        paths = [path_inside(folder, frame.name, frame.where, self.strict_links) for frame in frames]
        records = [Record(f.name, int(c), path) for f, c, path in zip(frames, self._classes(frames), paths)]
        for record, frame in zip(records, frames):
            if not record.path.is_file():
                raise MissingFileError(f"{frame.where}: {folder} has no picture {record.name!r}.")
        good, notes = readable_records(records, self.on_bad_image, [root, folder], frame_error, self.strict_links)
        self._notes += notes
        table_days = {frame.name: frame.day for frame in frames}
        days = {record.name: table_days[record.name] or self._file_date(record.path) for record in good}
        return {split: self._picture_source(split, good, days, table) for split in SPLITS}

    def _picture_source(
        self, split: Split, records: Sequence[Record], days: dict[str, date], table: Path
    ) -> PictureSource:
        for year in self.years[split]:
            if not any(day.year == year for day in days.values()):
                raise InputError(f"{table} has no picture of {year}, which {split}_years names.")
        chosen = [record for record in records if days[record.name].year in self.years[split]]
        groups = np.array([days[record.name].toordinal() for record in chosen], dtype=np.int64)
        return PictureSource(chosen, groups, self.preparation)

    def _file_date(self, path: Path) -> date:
        """Date of a picture without a date in the table: from its FITS header, or else from its file name."""
        text = path.name
        if is_fits(path):
            text = str(required_keyword(image_header(path)[0], self.fits_time, path))
        day = find_date(text)
        if day is None:
            raise BadImageError(f"Image {path} has no date in '{text}'; set columns.time to a column with the date.")
        return day


def check_years(years: dict[Split, list[int]]) -> dict[Split, list[int]]:
    """Sort the years of each split.

    Raises:
        InputError: a year is in two splits or twice in one, or a split has no year.
    """
    split_of: dict[int, str] = {}
    for split, chosen in years.items():
        if not chosen:
            raise InputError(f"{split}_years is empty; every split needs a year.")
        for year in chosen:
            if year in split_of:
                raise InputError(
                    f"Year {year} is in {split_of[year]}_years and in {split}_years; give it to one split."
                )
            split_of[year] = split
    return {split: sorted(chosen) for split, chosen in years.items()}
