"""Temporary arrays in memory-mapped files, for tables of results that are larger than memory."""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Stored = tuple[str, tuple[int, ...], np.dtype[Any], Iterable[np.ndarray]]
"""Name, shape and type of an array, and its rows in blocks."""

BLOCK = 4096
"""Number of rows that are in memory at once."""


def temporary_memmap(shape: tuple[int, ...], dtype: Any, folder: Path | None) -> np.ndarray:
    """An array of zeros in a temporary file of `folder`, or in memory where `folder` is None.

    The file has no name; the system frees its space together with the array. A folder without space for the file gives
    an array in memory, with a warning.
    """
    if folder is None or 0 in shape:
        return np.zeros(shape, dtype)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The mapping stays valid after the file is closed.
        with tempfile.TemporaryFile(dir=folder) as file:
            # The space is taken now: a mapping of a file with holes kills the process (SIGBUS) once the disk is full.
            # (macOS has no such call.)
            take = getattr(os, "posix_fallocate", lambda number, start, end: os.ftruncate(number, end))
            take(file.fileno(), 0, size)
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        warnings.warn(f"{folder} has no space for {size / 2**20:.0f} MiB ({error}); they stay in memory.", stacklevel=2)
        return np.zeros(shape, dtype)


def blocks(size: int) -> Iterator[slice]:
    """Slices of at most BLOCK rows that cover `range(size)`.

    Example:
        >>> list(blocks(5000))
        [slice(0, 4096, None), slice(4096, 5000, None)]
    """
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def write_npz(file: BinaryIO, arrays: Iterable[Stored]) -> None:
    """Write arrays to a compressed `.npz`, block by block; equal arrays give equal bytes.

    Args:
        file: a file that is open for writing.
        arrays: name, shape, type and row blocks of every array.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape, dtype, row_blocks in arrays:
            # The size of the entry is not known in advance, so its header has to allow for more than 4 GiB.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for block in row_blocks:
                    entry.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
