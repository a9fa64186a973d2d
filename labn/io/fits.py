"""Reader of FITS images (FITS standard 4.0): header cards, the first image, and its rotation to north up.

Uncompressed images need no further package; compressed ones (an extension of the file, as in JSOC's downloads) are
decompressed by astropy where it is installed.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from labn.errors import InputError
from labn.io.images import MAX_ASPECT, MAX_PIXELS, Array, BadImageError, read_image
from labn.io.readers import first_line

_BLOCK, _CARD = 2880, 80

_MAX_BLOCKS = 1024
"""Largest number of header blocks that is read; a file without an END card would be read to its end otherwise."""

# BITPIX -> NumPy type; FITS stores numbers big-endian.
_TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

MAGIC = b"SIMPLE  ="
_EXTENSION = b"XTENSION="

_MAX_EXTENSIONS = 64
"""Largest number of extensions that are searched for an image."""

_QUARTER_TOLERANCE = 1.0
"""Rotations within this many degrees of a quarter turn count as quarter turns, which need no interpolation.

HMI's camera is mounted upside down: CROTA2 is 180 up to some hundredths of a degree.
"""


def is_fits(path: Path) -> bool:
    """Whether the file starts with the first card of a FITS header, whatever its suffix is."""
    return _starts_with(path, MAGIC, 0)


def _starts_with(path: Path, card: bytes, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(len(card)) == card


def read_header(path: Path, start: int = 0) -> tuple[dict[str, Any], int]:
    """Read one header: keyword -> value (bool, int, float or str), and the offset of its data in bytes.

    Args:
        path: the file.
        start: offset of the header in bytes; 0 is the primary header.

    Raises:
        BadImageError: the file is not a FITS file, or ends inside its header.
    """
    cards: dict[str, Any] = {}
    with path.open("rb") as file:
        file.seek(start)
        for _ in range(_MAX_BLOCKS):
            block = file.read(_BLOCK)
            if not cards and not block.startswith(_EXTENSION if start else MAGIC):
                raise BadImageError(f"Image {path} is not a FITS file.")
            if len(block) < _BLOCK:
                raise BadImageError(f"Image {path} is truncated (its FITS header has no END).")
            for first in range(0, _BLOCK, _CARD):
                card = block[first : first + _CARD].decode("ascii", "replace")
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


def image_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of the first image of a file, primary or in an extension, and the offset of its data in bytes.

    Raises:
        BadImageError: the file is not a FITS file, is truncated, or has no two-dimensional image.
        InputError: a keyword is missing.
    """
    header, offset = read_header(path)
    for _ in range(_MAX_EXTENSIONS):
        if _is_compressed(header) or (
            required_keyword(header, "NAXIS", path) == 2 and header.get("XTENSION", "IMAGE") == "IMAGE"
        ):
            return header, offset
        # Data are padded to whole blocks; the next header begins behind them (FITS standard 4.0, section 4.4.1.2).
        sides = [_integer(header, f"NAXIS{n + 1}", path) for n in range(_integer(header, "NAXIS", path))]
        cells = header.get("GCOUNT", 1) * (header.get("PCOUNT", 0) + math.prod(sides)) if sides else 0
        offset += -(-abs(_integer(header, "BITPIX", path)) // 8 * cells // _BLOCK) * _BLOCK
        if not _starts_with(path, _EXTENSION, offset):
            break
        header, offset = read_header(path, offset)
    raise BadImageError(f"Image {path} has no two-dimensional image, neither primary nor in an extension.")


def _is_compressed(header: dict[str, Any]) -> bool:
    """Whether a header is that of a tile-compressed image, stored as a table (FITS standard 4.0, section 10)."""
    return header.get("ZIMAGE") is True


def image_layout(path: Path) -> tuple[dict[str, Any], int, tuple[int, int], np.dtype[Any]]:
    """Header, offset of the data in bytes, (height, width), and type of the stored numbers of the first image.

    No pixel is read. The offset of a compressed image is that of the table that holds it.

    Raises:
        BadImageError: the file is not a FITS file, is truncated, has no two-dimensional image, or has a compressed
            image and astropy is not installed.
        InputError: a keyword is missing.
    """
    header, offset = image_header(path)
    z = "Z" if _is_compressed(header) else ""
    kind = _TYPES.get(_integer(header, f"{z}BITPIX", path))
    if kind is None or required_keyword(header, f"{z}NAXIS", path) != 2:
        raise BadImageError(f"Image {path} has no two-dimensional image, neither primary nor in an extension.")
    shape = _integer(header, f"{z}NAXIS2", path), _integer(header, f"{z}NAXIS1", path)
    if min(shape) < 1 or shape[0] * shape[1] > MAX_PIXELS or max(shape) > MAX_ASPECT * min(shape):
        raise BadImageError(f"Image {path} declares {shape[1]} x {shape[0]} pixels, a size that no image may have.")
    stored = np.dtype(kind)
    if z and importlib.util.find_spec("astropy") is None:
        raise BadImageError(f"Image {path} is compressed (an extension of the FITS file); install astropy to read it.")
    if not z and path.stat().st_size < offset + shape[0] * shape[1] * stored.itemsize:
        raise BadImageError(f"Image {path} is truncated (its header declares {shape[1]} x {shape[0]} pixels).")
    return header, offset, shape, stored


def rotation(header: dict[str, Any], path: Path) -> float:
    """Angle in degrees by which an image is turned counter-clockwise to have north up, in [0, 360).

    Angles within 1 degree of a quarter turn are rounded to it.

    The angle is CROTA2, or else that of the matrix PCi_j: pixel offsets (dx, dy) are world offsets
    (dx cos a - dy sin a, dx sin a + dy cos a) (Calabretta and Greisen 2002, eq. 186).

    Raises:
        BadImageError: a keyword is not a finite number.
    """
    first, second = ("PC1_1", "PC2_1") if "CROTA2" not in header else ("CROTA2", "CROTA2")
    values = [header.get(first, 1.0), header.get(second, 0.0)]
    for name, value in zip((first, second), values):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise BadImageError(f"Image {path}: FITS keyword {name} is {value!r}; it must be a finite number.")
    degrees = values[0] if "CROTA2" in header else math.degrees(math.atan2(values[1], values[0]))
    quarter = 90.0 * round(degrees / 90.0)
    return (quarter if abs(degrees - quarter) <= _QUARTER_TOLERANCE else float(degrees)) % 360.0


def turn_north_up(image: Array, degrees: float) -> Array:
    """Turn (H,W) uint8 with the top row first counter-clockwise.

    Multiples of 90 degrees move pixels exactly. Other angles are interpolated bilinearly about the image's
    centre, in the same size; corners from outside of the image become 0.

    Example:
        >>> turn_north_up(np.array([[1, 2], [3, 4]], np.uint8), 180.0).tolist()
        [[4, 3], [2, 1]]
    """
    if degrees % 90.0 == 0.0:
        return np.ascontiguousarray(np.rot90(image, round(degrees / 90.0)))
    height, width = image.shape
    # OpenCV turns counter-clockwise for an origin at the top left, about pixel centres.
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)


def _decompressed(path: Path) -> Array:
    """Physical values (H,W) float64 of a compressed image, bottom row first, NaN where undefined."""
    # Optional, and slow to import: only files with a compressed image need it.
    from astropy.io import fits

    # astropy raises many kinds of errors for damaged files.
    try:
        with fits.open(path, memmap=False) as units:
            image = next(unit for unit in units if isinstance(unit, fits.CompImageHDU))
            blank, scaled = image.header.get("BLANK"), np.asarray(image.data, dtype=np.float64)
            zero, scale = image.header.get("BZERO", 0.0), image.header.get("BSCALE", 1.0)
    except Exception as error:
        raise BadImageError(f"Image {path} cannot be decompressed ({first_line(error)}).") from error
    if blank is not None:
        scaled[scaled == zero + scale * blank] = np.nan
    return scaled


def read_fits(path: Path, low: float, high: float) -> Array:
    """Read the first image as (H,W) uint8 with the top row first and north up, see `rotation`.

    Physical values are BZERO + BSCALE * stored values (FITS standard 4.0, section 4.4.2.5). They are mapped linearly
    from [low, high] to [0, 255] and clipped; undefined pixels (BLANK or NaN) become 0.

    Args:
        path: a FITS file with a two-dimensional image; a compressed one needs astropy.
        low: physical value (gauss in a magnetogram) that becomes black.
        high: physical value that becomes white, above `low`.

    Raises:
        BadImageError: see `image_layout`.
        InputError: see `image_layout`.
    """
    header, offset, shape, kind = image_layout(path)
    if _is_compressed(header):
        return turn_north_up(_grey(_decompressed(path), low, high), rotation(header, path))
    zero, scale = (_scaling(header, name, path) for name in ("BZERO", "BSCALE"))
    stored = np.fromfile(path, dtype=kind, count=shape[0] * shape[1], offset=offset)
    values = stored.astype(np.float64)
    if "BLANK" in header and kind.kind != "f":
        values[stored == header["BLANK"]] = np.nan
    with np.errstate(over="ignore", invalid="ignore"):
        physical = zero + scale * values
    return turn_north_up(_grey(physical.reshape(shape), low, high), rotation(header, path))


def _grey(physical: Array, low: float, high: float) -> Array:
    """Grey image (H,W) uint8 with the top row first from physical values, bottom row first."""
    with np.errstate(over="ignore", invalid="ignore"):
        grey = np.clip((physical - low) / (high - low), 0.0, 1.0) * 255.0
    # FITS stores the bottom row first.
    return np.rint(np.nan_to_num(grey, nan=0.0)).astype(np.uint8)[::-1]


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
