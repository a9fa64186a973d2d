"""Atomic writes: a file with its final name is whole, and errors name the file and the remedy."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from labn.errors import FileError

FULL = (errno.ENOSPC, errno.EDQUOT)

LEFTOVERS = ".*.tmp"
"""What files are called while they are written; a killed process leaves its last one behind."""


def write_error(path: Path, error: OSError) -> FileError:
    """An error of the same kind that names the file and says what would help."""
    advice = (
        "free some space and give the same command again"
        if error.errno in FULL
        else "make the folder writable, or give another one"
    )
    return FileError(error.errno, f"{path} cannot be written: {error.strerror or error}; {advice}.")


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name `path` once the block has ended well.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing half-written stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def check_writable(folder: Path, argument: str) -> None:
    """Fail at once, and not after the first epoch, where results cannot be written.

    Raises:
        OSError: `folder`, which `argument` names, cannot be made or written.
    """
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"whole")
    except OSError as error:
        raise write_error(Path(f"{argument} {folder}"), error) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def unused_folder(folder: Path) -> Path:
    """`<folder>.old-1`, `.old-2`, ...: the first that does not exist, where what is in the way can be kept."""
    return next(aside for n in itertools.count(1) if not (aside := Path(f"{folder}.old-{n}")).exists())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes have left half-written in `folder` itself; nobody may be writing there."""
    for path in folder.glob(LEFTOVERS):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that a reader sees either nothing or the whole file."""
    with written_atomically(path) as file:
        file.write(data)
