"""Image files: decoding, resizing, listing, content hashes, and groups of byte-identical files."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image

from labn.errors import InputError

Array = np.ndarray[Any, Any]

Box = tuple[float, float, float, float]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")

MAX_PIXELS = 2**27
"""Largest number of pixels of an image; a header of a few bytes can declare more pixels than memory can hold."""

MAX_ASPECT = 256
"""Largest ratio of the longer to the shorter side; resizing the shorter side enlarges the longer side as well."""

MAX_BYTES = 2**31
"""Largest size of an image file in bytes."""

BLOCK = 2**12
"""Number of bytes of each range that `content_hash` reads."""


class BadImageError(InputError):
    """An image file is missing, empty, damaged or not an image; the message names it."""


def regular_file_size(path: Path) -> int:
    """Size of a regular file in bytes.

    Raises:
        OSError: the path is not a regular file (reading a pipe would never end), or the file is above MAX_BYTES.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    if info.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES} bytes", path)
    return info.st_size


def size_error(file: Path | bytes) -> str | None:
    """The reason why the size in an image's header is not accepted, as the end of a sentence; or None.

    No pixel is decoded.

    Args:
        file: path of an image file, or its content.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return f"declares more than {MAX_PIXELS} pixels"
    # Pillow raises many kinds of errors for damaged headers.
    except Exception:
        return "is not an image"
    if width * height > MAX_PIXELS:
        return f"declares {width} x {height} pixels, more than {MAX_PIXELS}"
    if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        return f"has {width} x {height} pixels; the longer side may be {MAX_ASPECT} times the shorter at most"
    return None


def oriented_size(path: Path) -> tuple[int, int]:
    """(width, height) of the image that `read_image` returns, with its EXIF orientation applied.

    No pixel is decoded. `size_error(path)` must be None.
    """
    base = ExifTags.Base
    with Image.open(path, formats=_FORMATS) as image:
        (width, height), tags = image.size, _tags(image)
        if image.format == "TIFF":  # some versions of Pillow apply the orientation to the size of a TIFF
            width, height = tags.get(base.ImageWidth, width), tags.get(base.ImageLength, height)
    return (height, width) if tags.get(base.Orientation) in range(5, 9) else (width, height)


def _tags(image: Image.Image) -> Mapping[int, Any]:
    # Pillow raises many kinds of errors for damaged metadata, which decoders ignore.
    try:
        return dict(image.getexif())
    except Exception:
        return {}


def read_image(path: Path, channels: int = 3) -> Array:
    """Decode an image to (H,W,channels) uint8, RGB or grey, with its EXIF orientation applied.

    Alpha channels are dropped, and 16-bit values are divided by 256.

    Raises:
        BadImageError: the file is missing, declares a size out of range, or cannot be decoded.
    """
    return decode_image(_content(path), str(path), channels)


def decode_image(data: bytes, name: str, channels: int = 3) -> Array:
    """`read_image` for the content of a file; `name` stands for the file in messages."""
    image = _decode(data, name, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    return image[..., None] if channels == 1 else np.ascontiguousarray(image[..., ::-1])


def read_mask(path: Path) -> Array:
    """Decode a mask to (H,W) bool: True for every pixel with a non-zero value of 8 or 16 bits; alpha is dropped.

    Raises:
        BadImageError: see `read_image`.
    """
    return decode_mask(_content(path), str(path))


def decode_mask(data: bytes, name: str) -> Array:
    """`read_mask` for the content of a file; `name` stands for the file in messages."""
    # Read with all colours and bits: conversions to grey or to 8 bits would round small values to 0.
    return cv2.inRange(_decode(data, name, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH), (0, 0, 0), (0, 0, 0)) == 0


def _content(path: Path) -> bytes:
    try:
        regular_file_size(path)
        return path.read_bytes()
    except OSError as error:
        if path.is_dir():
            raise BadImageError(f"{path} is a folder; give the image files in it.") from error
        raise BadImageError(f"Image {path} cannot be read ({error.strerror}); put it back or replace it.") from error


def _decode(data: bytes, name: str, flags: int) -> Array:
    if reason := size_error(data):
        raise BadImageError(f"Image {name} {reason}; replace it or take it out of the data.")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise BadImageError(f"Image {name} cannot be decoded; replace it or take it out of the data.")
    return image


def check_crop(box: Box | None) -> Box | None:
    """Check a crop box (left, top, right, bottom as fractions of width and height) and return it.

    Raises:
        InputError: the box is given in pixels, or is empty after clipping to [0, 1].
    """
    if box is None:
        return None
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in box)
    if not (left < right and top < bottom and all(-1.0 <= edge <= 2.0 for edge in box)):
        raise InputError(
            f"crop is {tuple(box)}; it must be left, top, right, bottom in fractions of width and height (0 to 1, not "
            "pixels), left below right and top below bottom."
        )
    return box


def crop(image: Array, box: Box | None) -> Array:
    """Crop (H,W,...) to `box`: left, top, right, bottom as fractions of the size, clipped to the image.

    Raises:
        InputError: the image is so small that the box has no pixel.

    Example:
        >>> crop(np.arange(8).reshape(2, 4), (0.25, 0.0, 0.75, 1.0)).tolist()
        [[1, 2], [5, 6]]
    """
    if box is None:
        return image
    height, width = image.shape[:2]
    left, right = (round(min(max(x, 0.0), 1.0) * width) for x in (box[0], box[2]))
    top, bottom = (round(min(max(y, 0.0), 1.0) * height) for y in (box[1], box[3]))
    if left >= right or top >= bottom:
        raise InputError(f"crop {tuple(box)} leaves no pixel of an image of {width} x {height}; widen it.")
    return image[top:bottom, left:right]


def blacken_caption(image: Array, caption: float) -> Array:
    """Paint the lowest `caption` (a share of the height) of an image (H,W,C) black, in a copy; 0 returns the image."""
    if not caption:
        return image
    image = image.copy()
    image[round(len(image) * (1.0 - caption)) :] = 0
    return image


def to_square(image: Array, size: int, shorter: int | None = None) -> Array:
    """Bring (H,W,C) uint8 to (size,size,C).

    Args:
        image: the pixels.
        size: side of the square in pixels.
        shorter: None squashes the whole image; else the shorter side is resized to this many pixels and the central
            square is taken, which keeps the aspect.

    Example:
        >>> image = np.zeros((6, 12, 3), np.uint8)
        >>> to_square(image, 4).shape, to_square(image, 4, shorter=5).shape
        ((4, 4, 3), (4, 4, 3))
    """
    return squash(image, size) if shorter is None else centre(resize_short_side(image, shorter), size)


def squash(image: Array, size: int) -> Array:
    """Resize (H,W,C) uint8 to (size,size,C) without keeping the aspect: area average to shrink, else bilinear.

    An image of that size is returned as it is.
    """
    if image.shape[:2] == (size, size):
        return image
    shrinks = min(image.shape[:2]) >= size
    out = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return out if out.ndim == 3 else out[..., None]


def resize_short_side(image: Array, size: int) -> Array:
    """Resize (H,W,C) uint8 to a shorter side of `size`, keeping the aspect: area average to shrink, else bilinear."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    out = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return out if out.ndim == 3 else out[..., None]


def centre(image: Array, size: int) -> Array:
    """The central square (size,size,...) of (H,W,...).

    Raises:
        InputError: a side is shorter than `size`.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise InputError(f"An image of {height} x {width} pixels has no central {size} x {size}; resize it first.")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def squash_mask(mask: Array, size: int) -> Array:
    """Resize (H,W) bool to (size,size) bool by nearest neighbours, with pixel centres aligned."""
    return cv2.resize(mask.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST_EXACT) > 0


def image_files(folder: Path) -> list[Path]:
    """Files of `folder` with the suffix of an image, sorted by name; hidden files and subfolders are not listed."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def other_files(folder: Path) -> Counter[str]:
    """Suffix -> number of entries of `folder` that `image_files` does not list; hidden entries are not counted."""
    others = (p for p in folder.iterdir() if p.suffix.lower() not in SUFFIXES and not p.name.startswith("."))
    return Counter("folder" if p.is_dir() else p.suffix.lower() or "without suffix" for p in others)


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """File name without suffix -> file.

    Raises:
        InputError: two files differ only in their suffix, as `a.jpg` and `a.png` do.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if path.stem in files:
            raise InputError(f"{files[path.stem]} and {path.name} are both image {path.stem!r}; keep one of them.")
        files[path.stem] = path
    return files


def identical_groups(paths: Sequence[Path]) -> list[int]:
    """A group number for every path, equal for byte-identical files; only files of equal size are hashed."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        by_size[path.stat().st_size].append(i)
    groups = list(range(len(paths)))
    for same in (s for s in by_size.values() if len(s) > 1):
        first: dict[bytes, int] = {}
        for i in same:
            groups[i] = first.setdefault(hashlib.sha256(paths[i].read_bytes()).digest(), i)
    return groups


def content_hash(path: Path, blocks: int = 16) -> str:
    """Hash (32 hex digits) of a file's size and bytes, equal for every copy of the file.

    Of a file of at most `blocks` * 4 KiB all bytes are hashed. Of a larger file, `blocks` ranges of 4 KiB are, evenly
    spaced from the first byte to the last, so that a large data set is hashed in little time. A change outside these
    ranges that keeps the size is not detected.
    """
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        hashed.update(b"%d\n" % size)
        if size <= blocks * BLOCK:
            hashed.update(file.read())
        else:
            for number in range(blocks):
                file.seek(number * (size - BLOCK) // (blocks - 1))
                hashed.update(file.read(BLOCK))
    return hashed.hexdigest()[:32]


def digest(lines: Iterable[object]) -> str:
    """First 16 hex digits of the SHA-256 of the lines' texts."""
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()[:16]
