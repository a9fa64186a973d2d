"""Checks of image files before training, without decoding them where the format allows it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from labn.io.images import BadImageError, read_image, regular_file_size, size_error

_JPEG, _PNG, _WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"


def image_error(path: Path) -> str | None:
    """The reason why `path` is not a complete image, as the end of a sentence; None for a complete image.

    - JPEG: the header is read, and the last KiB must have the end-of-image marker. A file without it is decoded,
      because photographs of phones may have further data behind the marker.
    - PNG: the checksums of all chunks are compared; where one fails, the file is decoded.
    - WebP: the header is read, which includes the length.
    - BMP, TIFF: the file is decoded.
    """
    try:
        size = regular_file_size(path)
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(max(0, size - 1024))
            tail = file.read()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if reason := size_error(path):
        return reason
    if head.startswith(_JPEG):
        whole = b"\xff\xd9" in tail or _is_whole_jpeg(path)
        return None if whole else "is truncated (no end-of-image marker)"
    if head.startswith(_PNG):
        return _png_error(path, tail)
    if head.startswith(_WEBP) or _can_be_decoded(path):
        return None
    return "cannot be decoded (it is truncated or damaged, or its values have neither 8 nor 16 bits)"


def _is_whole_jpeg(path: Path) -> bool:
    """Whether Pillow decodes the whole file; Pillow raises for missing data, where OpenCV 4 fills in grey."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            image.load()
    # Pillow raises many kinds of errors for damaged files.
    except Exception:
        return False
    return True


def _png_error(path: Path, tail: bytes) -> str | None:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    # Pillow raises many kinds of errors for damaged files.
    except Exception:
        if not _can_be_decoded(path):
            return "is damaged (a checksum does not fit)" if b"IEND" in tail else "is truncated (no IEND chunk)"
    return None


def _can_be_decoded(path: Path) -> bool:
    try:
        read_image(path)
    except BadImageError:
        return False
    return True
