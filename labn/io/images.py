"""Image files: where the data lies, reading, byte-identical pairs."""

from __future__ import annotations

import errno
import hashlib
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
"""Of one image: a few bytes can promise more pixels than there is memory."""

MAX_ASPECT = 256
"""Longer side over shorter: bringing the shorter side to a given size multiplies the longer one too."""

MAX_BYTES = 2**31
"""Of one image file."""

BLOCK = 2**12
"""Bytes of one of the ranges that `content_hash` reads."""


class BadImageError(InputError):
    """An image file that is empty, truncated or no image; the message names it."""


def regular_file_size(path: Path) -> int:
    """Bytes of a file. Raises `OSError` for what is none, such as a pipe, which would never end, and for a huge one."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    if info.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES} bytes", path)
    return info.st_size


def size_error(path: Path) -> str | None:
    """Why the size that an image's header promises is refused, or None; no pixel is decoded."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return f"promises more than {MAX_PIXELS} pixels"
    # Its readers of headers end in many ways on a damaged file.
    except Exception:
        return "is not an image"
    if width * height > MAX_PIXELS:
        return f"promises {width} x {height} pixels, more than {MAX_PIXELS}"
    if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        return f"has {width} x {height} pixels; the longer side may be {MAX_ASPECT} times the shorter at most"
    return None


def oriented_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as `read_image` gives it, its EXIF orientation applied; no pixel is decoded.

    `path` must have passed `size_error`.
    """
    base = ExifTags.Base
    with Image.open(path, formats=_FORMATS) as image:
        (width, height), tags = image.size, _tags(image)
        if image.format == "TIFF":  # whose size some versions of Pillow turn themselves
            width, height = tags.get(base.ImageWidth, width), tags.get(base.ImageLength, height)
    return (height, width) if tags.get(base.Orientation) in range(5, 9) else (width, height)


def _tags(image: Image.Image) -> Mapping[int, Any]:
    # Metadata may be damaged in any way; decoding ignores it then.
    try:
        return dict(image.getexif())
    except Exception:
        return {}


def read_image(path: Path, channels: int = 3) -> Array:
    """Decode to (H,W,channels) uint8, RGB or grey; alpha is dropped, 16-bit values are divided by 256.

    Raises:
        BadImageError: the file is missing, promises a huge size, or cannot be decoded.
    """
    image = _decode(path, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    return image[..., None] if channels == 1 else np.ascontiguousarray(image[..., ::-1])


def read_mask(path: Path) -> Array:
    """Decode to (H,W) bool: every pixel of 8 or 16 bits that is not 0 belongs to the region; alpha is dropped.

    Raises:
        BadImageError: as of `read_image`.
    """
    # Neither as grey nor as 8 bits: both round small values to 0.
    return cv2.inRange(_decode(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH), (0, 0, 0), (0, 0, 0)) == 0


def _decode(path: Path, flags: int) -> Array:
    try:
        regular_file_size(path)
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise BadImageError(f"Image {path} cannot be read ({error.strerror}); put it back or replace it.") from error
    if reason := size_error(path):
        raise BadImageError(f"Image {path} {reason}; replace it or take it out of the data.")
    try:
        image = cv2.imdecode(data, flags)
    except cv2.error:
        image = None
    if image is None:
        raise BadImageError(f"Image {path} cannot be decoded; replace it or take it out of the data.")
    return image


def check_crop(box: Box | None) -> Box | None:
    """`box` itself: left, top, right, bottom in fractions of a picture, which `crop` clips to [0, 1].

    Raises:
        ValueError: pixels instead of fractions, or nothing lies between the edges.
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
    """The part of (H,W,...) inside `box`: left, top, right, bottom in fractions of the size, clipped to the image.

    Raises:
        ValueError: the image is so small that no pixel lies inside.
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
    """Resize (H,W,C) uint8 so that its shorter side is `size`, keeping the aspect; area average to shrink."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    out = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return out if out.ndim == 3 else out[..., None]


def centre(image: Array, size: int) -> Array:
    """The (size,size,...) middle of (H,W,...); an image of that size is returned as it is.

    Raises:
        ValueError: a side is shorter than `size`.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise InputError(f"An image of {height} x {width} pixels has no middle of {size} x {size}; resize it first.")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def squash_mask(mask: Array, size: int) -> Array:
    """Resize (H,W) bool to (size,size) bool, nearest neighbour with pixel centres aligned."""
    return cv2.resize(mask.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST_EXACT) > 0


def image_files(folder: Path) -> list[Path]:
    """Image files of `folder`, sorted by name, subfolders and hidden files left out."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def other_files(folder: Path) -> Counter[str]:
    """How many entries of each suffix `image_files` leaves out of `folder`, hidden ones not counted."""
    left = (p for p in folder.iterdir() if p.suffix.lower() not in SUFFIXES and not p.name.startswith("."))
    return Counter("folder" if p.is_dir() else p.suffix.lower() or "without suffix" for p in left)


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by their names without suffix.

    Raises:
        ValueError: two files share one, as `a.jpg` and `a.png` do.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(f"{found[path.stem]} and {path.name} are both image {path.stem!r}; keep one of them.")
        found[path.stem] = path
    return found


def identical_groups(paths: Sequence[Path]) -> list[int]:
    """A group number for every path; byte-identical files share one. Only files of equal size are hashed."""
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
    """Hash (32 hex digits) of a file's size and bytes, the same for every copy of it.

    All bytes count in a file of up to `blocks` times 4 KiB; of a larger one so many ranges of 4 KiB do, evenly spaced
    from its first byte to its last, so that a data set is hashed without reading it whole: a change that leaves the
    size and all of these ranges as they are goes unnoticed.
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
