"""A reader of FITS images without further packages: header cards and the primary image (FITS standard 4.0)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from labn.errors import InputError
from labn.io.images import MAX_ASPECT, MAX_PIXELS, Array, BadImageError, read_image

_BLOCK, _CARD = 2880, 80

_MAX_BLOCKS = 1024
"""Largest number of header blocks that is read; a file without an END card would be read to its end otherwise."""

# BITPIX -> NumPy type; FITS stores numbers big-endian.
_TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

MAGIC = b"SIMPLE  ="


def is_fits(path: Path) -> bool:
    """Whether the file starts with the first card of a FITS header, whatever its suffix is."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the primary header: keyword -> value (bool, int, float or str), and the offset of the data in bytes.

    Raises:
        BadImageError: the file is not a FITS file, or ends inside its header.
    """
    cards: dict[str, Any] = {}
    with path.open("rb") as file:
        for _ in range(_MAX_BLOCKS):
            block = file.read(_BLOCK)
            if not cards and not block.startswith(MAGIC):
                raise BadImageError(f"Image {path} is not a FITS file.")
            if len(block) < _BLOCK:
                raise BadImageError(f"Image {path} is truncated (its FITS header has no END).")
            for start in range(0, _BLOCK, _CARD):
                card = block[start : start + _CARD].decode("ascii", "replace")
                if card[:8].rstrip() == "END":
                    return cards, file.tell()
                if card[8:10] == "= ":
                    cards[card[:8].rstrip()] = _parse_value(card[10:])
    raise BadImageError(f"Image {path} has a FITS header of more than {_MAX_BLOCKS} blocks.")


def _parse_value(text: str) -> bool | int | float | str:
    text = text.strip()
    if text.startswith("'"):
        # A quote inside a string is written twice.
        return text[1:].replace("''", "\0").split("'")[0].replace("\0", "'").rstrip()
    text = text.split("/")[0].strip()
    if text in ("T", "F"):
        return text == "T"
    for kind in (int, float):
        try:
            return kind(text.replace("D", "E"))  # Fortran writes double exponents as 1.5D3
        except ValueError:
            continue
    return text


def required_keyword(header: dict[str, Any], name: str, path: Path) -> Any:
    """Value of a keyword that the header must have.

    Raises:
        InputError: the header does not have the keyword.
    """
    if name not in header:
        raise InputError(f"Image {path} has no FITS keyword {name}; its header needs it.")
    return header[name]


def _integer(header: dict[str, Any], name: str, path: Path) -> int:
    value = required_keyword(header, name, path)
    if type(value) is not int:
        raise BadImageError(f"Image {path}: FITS keyword {name} is {value!r}; it must be an integer.")
    return value


def _scaling(header: dict[str, Any], name: str, path: Path) -> float:
    """BZERO or BSCALE, with the standard's defaults 0 and 1."""
    value = header.get(name, {"BZERO": 0.0, "BSCALE": 1.0}[name])
    if type(value) not in (int, float):
        raise BadImageError(f"Image {path}: FITS keyword {name} is {value!r}; it must be a number.")
    return float(value)


def image_layout(path: Path) -> tuple[dict[str, Any], int, tuple[int, int], np.dtype[Any]]:
    """Header, offset of the pixels in bytes, (height, width), and stored type of the primary image.

    No pixel is read.

    Raises:
        BadImageError: the file is not a FITS file, is truncated, or has no two-dimensional primary image.
        InputError: a keyword is missing.
    """
    header, offset = read_header(path)
    kind = _TYPES.get(_integer(header, "BITPIX", path))
    if required_keyword(header, "NAXIS", path) != 2 or kind is None:
        raise BadImageError(
            f"Image {path} has no two-dimensional primary image; unpack a compressed image, which is an extension."
        )
    shape = _integer(header, "NAXIS2", path), _integer(header, "NAXIS1", path)
    if min(shape) < 1 or shape[0] * shape[1] > MAX_PIXELS or max(shape) > MAX_ASPECT * min(shape):
        raise BadImageError(f"Image {path} declares {shape[1]} x {shape[0]} pixels, a size that no image may have.")
    stored = np.dtype(kind)
    if path.stat().st_size < offset + shape[0] * shape[1] * stored.itemsize:
        raise BadImageError(f"Image {path} is truncated (its header declares {shape[1]} x {shape[0]} pixels).")
    return header, offset, shape, stored


def read_fits(path: Path, low: float, high: float) -> Array:
    """Read the primary image as (H,W) uint8 with the top row first.

    Physical values are BZERO + BSCALE * stored values (FITS standard 4.0, section 4.4.2.5). They are mapped linearly
    from [low, high] to [0, 255] and clipped; undefined pixels (BLANK or NaN) become 0.

    Args:
        path: an uncompressed FITS file with a two-dimensional primary image.
        low: physical value (gauss in a magnetogram) that becomes black.
        high: physical value that becomes white, above `low`.

    Raises:
        BadImageError: see `image_layout`.
        InputError: see `image_layout`.
    """
    header, offset, shape, kind = image_layout(path)
    zero, scale = (_scaling(header, name, path) for name in ("BZERO", "BSCALE"))
    stored = np.fromfile(path, dtype=kind, count=shape[0] * shape[1], offset=offset)
    values = stored.astype(np.float64)
    if "BLANK" in header and kind.kind != "f":
        values[stored == header["BLANK"]] = np.nan
    with np.errstate(over="ignore", invalid="ignore"):
        grey = np.clip((zero + scale * values - low) / (high - low), 0.0, 1.0) * 255.0
    # FITS stores the bottom row first.
    return np.rint(np.nan_to_num(grey, nan=0.0)).astype(np.uint8).reshape(shape)[::-1]


def read_picture(path: Path, channels: int, fits_range: tuple[float, float] | None) -> Array:
    """A picture (H,W,C) uint8: an image file, or a FITS file where `fits_range` is given.

    Args:
        path: the file.
        channels: 3 (RGB) or 1 (grey) for image files; FITS files are always grey.
        fits_range: physical values that become black and white; None reads image files only.

    Raises:
        BadImageError: the file is damaged or is not an image.
    """
    if fits_range is not None and is_fits(path):
        return read_fits(path, *fits_range)[..., None]
    return read_image(path, channels)
