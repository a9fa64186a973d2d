"""Sources of full-disk solar frames: one memory map per year, or picture files (PNG, JPEG, FITS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.io.sources import FileSource, Record, Source, file_error
from labn.errors import InputError, MissingFileError
from labn.io.fits import image_header, image_layout, is_fits, read_picture, rotation
from labn.io.images import MAX_ASPECT, MAX_PIXELS, Array, BadImageError, blacken_caption, content_hash, to_square

# Number of 4 KiB samples in the content hash of a file with a year of frames: one for every nine hourly frames.
_BLOCKS = 1024


@dataclass(frozen=True)
class Preparation:
    """The steps from a frame to a network's input. The data hash includes the `repr` of this dataclass.

    Attributes:
        size: side in pixels; frames of another size are squashed.
        caption: share of the height that is painted black at the bottom, because text is written there.
        fits_range: physical values that become black and white.

    Example:
        >>> Preparation(size=4, caption=0.25)(np.full((8, 8), 200, np.uint8))[..., 0].tolist()
        [[200, 200, 200, 200], [200, 200, 200, 200], [200, 200, 200, 200], [0, 0, 0, 0]]
    """

    size: int
    caption: float = 0.0
    fits_range: tuple[float, float] = (-1500.0, 1500.0)

    def __call__(self, frame: Array) -> Array:
        """Prepare a frame (H,W) or (H,W,C) uint8 as (size,size,C) uint8."""
        frame = frame if frame.ndim == 3 else frame[..., None]
        return to_square(blacken_caption(frame, self.caption), self.size)


class YearSource(Source):
    """Frames of `{year}.npy` files, each (n,H,W) uint8.

    Every frame is read through a memory map that is opened for this one read. No file is ever loaded whole, no page
    stays mapped in the process, and the copy for a worker process holds paths only.

    Args:
        files: the files of the split.
        positions: (N,2) int64, the number of the file and the number of the frame in it, for every sample.
        names: names of the samples.
        labels: (N,) int64 classes.
        groups: (N,) int64 days.
        preparation: steps from frame to input.
    """

    has_masks = False

    def __init__(
        self,
        files: Sequence[Path],
        positions: Array,
        names: Sequence[str],
        labels: Array,
        groups: Array,
        preparation: Preparation,
    ) -> None:
        self.files, self.positions, self.names = list(files), positions, names
        self.labels, self.groups, self.preparation = labels, groups, preparation

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """The preparation, names and content hashes of the files, and the positions of the samples in them."""
        files = [(file.name, content_hash(file, _BLOCKS)) for file in self.files]
        return ["years", self.preparation, *files, *self.positions.tolist()]

    def load(self, index: int) -> tuple[Array, None]:
        """See `Source.load`."""
        file, number = self.positions[index]
        frame = np.array(np.load(self.files[file], mmap_mode="r", allow_pickle=False)[number])
        return self.preparation(frame), None


def check_frames(path: Path, rows: int) -> None:
    """Compare the array of a `{year}.npy` with the number of rows of its table; only the array's header is read.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file is not an array (n,H,W) uint8, or n differs from `rows`.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; every year of the splits needs its .npy and its .csv.")
    try:
        frames = np.lib.format.open_memmap(path, mode="r")
    # NumPy raises many kinds of errors for damaged headers.
    except Exception as error:
        raise InputError(f"{path} is not a whole .npy array of numbers ({error}).") from error
    if frames.dtype != np.uint8 or frames.ndim != 3:
        raise InputError(f"{path} holds {frames.dtype} of shape {frames.shape}; it must be uint8 (n, height, width).")
    height, width = frames.shape[1:]
    if not 0 < max(height, width) <= MAX_ASPECT * min(height, width) or height * width > MAX_PIXELS:
        raise InputError(f"{path} holds frames of {height} x {width} pixels, a size that no image may have.")
    if len(frames) != rows:
        raise InputError(f"{path} has {len(frames)} frames but {path.with_suffix('.csv')} has {rows} rows.")


class PictureSource(FileSource):
    """Solar picture files, read as grey; FITS files are scaled by `preparation.fits_range`.

    Args:
        records: picture files with names and labels.
        groups: (N,) int64 days.
        preparation: steps from frame to input.
    """

    def __init__(self, records: Sequence[Record], groups: Array, preparation: Preparation) -> None:
        super().__init__(records, preparation.size, channels=1)
        self.groups, self.preparation = groups, preparation

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """The preparation, the FITS files that are turned north up, and the identity of `FileSource`."""
        fits = [record for record in self.records if is_fits(record.path)]
        turned = [record.name for record in fits if rotation(image_header(record.path)[0], record.path)]
        # Only listed where there are any, which keeps the data hashes of versions that turned no image.
        return ["sun", self.preparation, *(["turned", *turned] if turned else []), *super().identity]

    def load(self, index: int) -> tuple[Array, None]:
        """See `Source.load`."""
        frame = read_picture(self.records[index].path, 1, self.preparation.fits_range)
        return self.preparation(frame), None


def frame_error(record: Record) -> str | None:
    """A sentence about a picture that cannot be read, or None; of FITS files only the header is read."""
    path = record.path
    if not path.is_file() or not is_fits(path):
        return file_error(record)
    try:
        rotation(image_layout(path)[0], path)
    except BadImageError as error:
        return str(error)
    return None
