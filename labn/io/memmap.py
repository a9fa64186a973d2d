"""Large tables on disk while results are merged: a file without a name, mapped into memory, gone afterwards."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Stored = tuple[str, tuple[int, ...], np.dtype[Any], Iterable[np.ndarray]]
"""Name, shape and type of an array, and its rows in blocks."""

BLOCK = 4096
"""Rows in memory at once."""


def temporary_memmap(shape: tuple[int, ...], dtype: Any, folder: Path | None) -> np.ndarray:
    """An array of zeros that lies on disk in `folder` (the system gives the room back with it), None: in memory."""
    if folder is None or 0 in shape:
        return np.zeros(shape, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    # The mapping outlives the file's handle.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def blocks(size: int) -> Iterator[slice]:
    """`range(size)` in slices of at most BLOCK."""
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def write_npz(file: BinaryIO, arrays: Iterable[Stored]) -> None:
    """A compressed `.npz`, written block by block; equal arrays give equal bytes.

    Args:
        file: open for writing.
        arrays: what goes into it.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape, dtype, rows in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for block in rows:
                    entry.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
