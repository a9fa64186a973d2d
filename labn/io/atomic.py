"""Atomic writes: a file with its final name is complete, and errors name the file and the remedy."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from labn.errors import FileError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

LEFTOVERS = ".*.tmp"
"""Pattern of the names that files and folders have while they are written; a killed process leaves them behind."""


def write_error(path: Path, error: OSError) -> FileError:
    """A `FileError` with the same error number, whose message names the file and the remedy."""
    advice = (
        "free some space and run the same command again"
        if error.errno in _DISK_FULL
        else "make the folder writable, or choose another one"
    )
    return FileError(error.errno, f"{path} cannot be written: {error.strerror or error}; {advice}.")


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, which is renamed to `path` when the block ends without an error.

    Raises:
        FileError: the folder cannot be written, or the disk is full; the temporary file is removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_atomically(Path(folder) / "a.txt") as file:
        ...         _ = file.write(b"complete")
        ...     sorted(os.listdir(folder))
        ['a.txt']
    """
    # The process number keeps two processes that write the same file from sharing a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                # Without this, a crash of the machine could leave a renamed file whose data never reached the disk.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def check_writable(folder: Path, argument: str) -> None:
    """Write a small file to `folder` and remove it, to find an unwritable folder before the first epoch.

    Args:
        folder: the folder; it is created.
        argument: name of the argument that gives the folder, for the message.

    Raises:
        FileError: the folder cannot be created or written.
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
    """The first of `<folder>.old-1`, `<folder>.old-2`, ... that does not exist, to move the folder's content to."""
    return next(path for n in itertools.count(1) if not (path := Path(f"{folder}.old-{n}")).exists())


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes left in `folder`; no process may be writing there."""
    for path in folder.glob(LEFTOVERS):
        remove_leftover(path)


def remove_leftover(path: Path) -> None:
    """Delete a temporary file, or a temporary folder with its content; it may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_not_removed(path: Path) -> None:
    """Check that a file which this command has written or read at its start is still in the run folder.

    Raises:
        FileError: the file has been removed; whatever is written from now on would make an incomplete folder.
    """
    if not path.exists():
        raise FileError(
            errno.ENOENT,
            f"{path} has been removed or moved while this command ran, so that its folder is incomplete; run the "
            "command again.",
        )


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that a reader sees either the complete new file or none of it.

    Raises:
        FileError: the folder cannot be written, or the disk is full.
    """
    with written_atomically(path) as file:
        file.write(data)
