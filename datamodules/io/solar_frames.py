"""Where full-disk solar frames come from: memory maps, one per year, or pictures (PNG, JPEG, FITS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.io.sources import FileSource, Record, Source, file_error
from labn.errors import InputError, MissingFileError
from labn.io.fits import image_layout, is_fits, read_picture
from labn.io.images import MAX_ASPECT, MAX_PIXELS, Array, BadImageError, blacken_caption, content_hash, to_square

# Of a file with a year of frames; one for every nine hourly frames.
_BLOCKS = 1024


@dataclass(frozen=True)
class Preparation:
    """How a frame becomes an input.

    Attributes:
        size: side in pixels; frames of another size are squashed.
        caption: share of the height, at the bottom, that is painted black because it carries text.
        fits_range: physical values that become black and white.
    """

    size: int
    caption: float = 0.0
    fits_range: tuple[float, float] = (-1500.0, 1500.0)

    def __call__(self, frame: Array) -> Array:
        """(H,W) or (H,W,C) uint8 -> (size,size,C) uint8."""
        frame = frame if frame.ndim == 3 else frame[..., None]
        return to_square(blacken_caption(frame, self.caption), self.size)


class YearSource(Source):
    """Frames of `{year}.npy` files, each (n,H,W) uint8.

    A frame is read through a memory map that lives no longer than the read: nothing is ever loaded whole, no page
    stays in the process, and a copy for a worker process carries paths only.

    Args:
        files: the files, one after another.
        rows: (N,2) int64, for every sample the number of its file and of its frame therein.
        names: one per sample.
        labels: (N,) int64 classes.
        groups: (N,) int64 days.
        preparation: see there.
    """

    has_masks = False

    def __init__(
        self,
        files: Sequence[Path],
        rows: Array,
        names: Sequence[str],
        labels: Array,
        groups: Array,
        preparation: Preparation,
    ) -> None:
        self.files, self.rows, self.names = list(files), rows, names
        self.labels, self.groups, self.preparation = labels, groups, preparation

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """Names and contents of the files, the rows taken from them, and the preparation."""
        files = [(file.name, content_hash(file, _BLOCKS)) for file in self.files]
        return ["years", self.preparation, *files, *self.rows.tolist()]

    def load(self, index: int) -> tuple[Array, None]:
        """See `Source.load`."""
        file, row = self.rows[index]
        frame = np.array(np.load(self.files[file], mmap_mode="r", allow_pickle=False)[row])
        return self.preparation(frame), None


def check_frames(path: Path, rows: int) -> None:
    """Compare a `{year}.npy` with the number of rows of its table; only the header is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no array, another type or shape than (n,H,W) uint8, or another n than `rows`.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; every year of the splits needs its .npy and its .csv.")
    try:
        frames = np.lib.format.open_memmap(path, mode="r")
    # A damaged header ends the reader in many ways.
    except Exception as error:
        raise InputError(f"{path} is not a whole .npy array of numbers ({error}).") from error
    if frames.dtype != np.uint8 or frames.ndim != 3:
        raise InputError(f"{path} holds {frames.dtype} of shape {frames.shape}; it must be uint8 (n, height, width).")
    if (
        not 0 < max(frames.shape[1:]) <= MAX_ASPECT * min(frames.shape[1:])
        or frames.shape[1] * frames.shape[2] > MAX_PIXELS
    ):
        raise InputError(f"{path} holds frames of {frames.shape[1]} x {frames.shape[2]} pixels, which no image has.")
    if len(frames) != rows:
        raise InputError(f"{path} has {len(frames)} frames but {path.with_suffix('.csv')} has {rows} rows.")


class PictureSource(FileSource):
    """Solar pictures in files, read as grey; FITS files are scaled by `preparation.fits_range`.

    Args:
        records: the samples.
        groups: (N,) int64 days.
        preparation: see there.
    """

    def __init__(self, records: Sequence[Record], groups: Array, preparation: Preparation) -> None:
        super().__init__(records, preparation.size, channels=1)
        self.groups, self.preparation = groups, preparation

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """As of `FileSource`, with the preparation."""
        return ["sun", self.preparation, *super().identity]

    def load(self, index: int) -> tuple[Array, None]:
        """See `Source.load`."""
        frame = read_picture(self.records[index].path, 1, self.preparation.fits_range)
        return self.preparation(frame), None


def frame_error(record: Record) -> str | None:
    """A sentence naming a picture that cannot be read, or None; FITS headers are read, nothing is decoded."""
    path = record.path
    if not path.is_file() or not is_fits(path):
        return file_error(record)
    try:
        image_layout(path)
    except BadImageError as error:
        return str(error)
    return None
