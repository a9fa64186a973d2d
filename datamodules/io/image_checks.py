"""Checks of image files before training, as cheap as their formats allow."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from labn.io.images import BadImageError, read_image, regular_file_size, size_error

_JPEG, _PNG, _WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"


def image_error(path: Path) -> str | None:
    """Why `path` cannot be a whole image, or None.

    Of a JPEG only header and last KiB are read, where its end-of-image marker must be; one without, which may have
    other data behind it as the photos of telephones do, is decoded. Of a PNG the checksums of all chunks are compared
    and it is decoded where one does not fit, of a WebP the length, and what has neither (BMP, TIFF) is decoded.
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
    """Whether Pillow decodes it, which stops at missing data; OpenCV 4 fills in grey."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            image.load()
    # It ends in many ways on a damaged file.
    except Exception:
        return False
    return True


def _png_error(path: Path, tail: bytes) -> str | None:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    # It ends in many ways on a damaged file.
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
