"""Files from elsewhere: read so that a broken or hostile one ends with a sentence that names file and line."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from labn.errors import InputError
from labn.io.memmap import blocks, temporary_memmap

Value = TypeVar("Value")

MAX_TEXT = 2**31
"""Bytes: larger tables, lists and manifests are refused instead of read into memory."""

MAX_ARRAYS = 2**34
"""Bytes that the arrays of one `.npz` may unpack to."""

MAX_YAML, MAX_NODES = 2**24, 100_000
"""Bytes and values (aliases unfolded) of a configuration."""

_OUTSIDE = re.compile(r"^[\\/]|^[A-Za-z]:|(^|[\\/])\.\.([\\/]|$)|[\x00-\x1f]")


def path_inside(root: Path, name: str, where: str) -> Path:
    """`root / name`, where that lies in `root`, also once links are followed.

    Args:
        root: a folder.
        name: a path as a table or list gives it.
        where: file and line, for the message.

    Raises:
        ValueError: `name` is empty, absolute, holds `..` or control characters, is too long for a file name, or leads
            out of `root` through a link.
    """
    if not name.strip() or _OUTSIDE.search(name) or any(len(os.fsencode(part)) > 255 for part in name.split("/")):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise InputError(f"{where}: {shown!r} must be a path inside {root}, without '..' and not absolute.")
    if leaves_folder(root / name, os.path.realpath(root)):
        raise InputError(f"{where}: {name!r} is a link that leaves {root}; put the file itself there.")
    return root / name


def non_utf8_name(name: str) -> str | None:
    """How a file name whose bytes are not UTF-8 is shown (`caf\\xe9.png`); None for one that tables can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return None


def leaves_folder(path: Path, real_root: str) -> bool:
    """Whether `path` lies outside of `real_root` (a path without links) once links are followed."""
    real = os.path.realpath(path)
    return real != real_root and not real.startswith(real_root.rstrip(os.sep) + os.sep)


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """A UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no UTF-8 (the message names the line).
    """
    if path.stat().st_size > limit:
        raise InputError(f"{path} is larger than {limit} bytes; no such file of this project is.")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: byte {data[error.start]:#04x} is no UTF-8; save it as UTF-8.") from None


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        where: `<file>, line <n>`.
        cells: column -> text without spaces around it; empty where the row is too short.
    """

    where: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def number(self, column: str, kind: Callable[[str], Value]) -> Value:
        """A cell as `int` or `float`.

        Raises:
            ValueError: it is none.
        """
        try:
            return kind(self.cells[column])
        except (ValueError, OverflowError):
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{self.where}: {column} is {self.cells[column][:100]!r}; it must be {what}.") from None


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells (without spaces around them) of every row of a CSV file, one at a time.

    Raises:
        OSError: it cannot be read.
        ValueError: no UTF-8, or no CSV; the message names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                yield reader.line_num, [cell.strip() for cell in row]
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: no CSV ({error}).") from None
        except UnicodeDecodeError:
            # The text is decoded in advance; only reading it whole tells the line.
            read_text(path)
            raise


def read_table(path: Path, columns: Sequence[str] = ()) -> Iterator[TableRow]:
    """The rows of a CSV file whose first line names the columns, one at a time; empty rows are left out.

    Args:
        path: the file.
        columns: those that it must have.

    Raises:
        OSError: it cannot be read.
        ValueError: no UTF-8, no CSV, or a column is missing; the message names the line.
    """
    rows = read_rows(path)
    _, header = next(rows, (1, []))
    for column in columns:
        if column not in header:
            raise InputError(
                f"{path} has no column '{column}' in its first line, only {', '.join(header) or 'nothing'}."
            )
    width = len(header)
    for number, row in rows:
        if any(row):
            yield TableRow(f"{path}, line {number}", dict(zip(header, [*row[:width], *[""] * (width - len(row))])))


def read_json(path: Path, kind: type[Value]) -> Value:
    """A JSON file that holds a `dict` or a `list`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or holds something else; the message names the line.
    """
    try:
        content: Any = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: no JSON ({error.msg}).") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply; no file of this project is.") from None
    except ValueError as error:  # not UTF-8, which names the file, or a number of thousands of digits
        raise error if str(path) in str(error) else InputError(f"{path}: no JSON ({error}).") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} holds a {type(content).__name__}; it must hold a {kind.__name__}.")
    return content


def read_yaml(path: Path, limit: int | None = None) -> Any:
    """A YAML file of plain values; nothing in it is executed, and aliases are counted before they are followed.

    Ten lines of ten aliases each stand for 10^9 values, which whoever copies the content would hold.

    Args:
        path: the file.
        limit: values that it may hold where every alias is written out; MAX_NODES by default.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML (the message names the line), or huge.
    """
    limit = MAX_NODES if limit is None else limit
    try:
        loader = yaml.SafeLoader(read_text(path, MAX_YAML))
        node = loader.get_single_node()
        if _count_values(node, {}) > limit:
            raise InputError(
                f"{path} holds more than {limit} values where its aliases (*name) are written out; write a smaller one."
            )
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise InputError(f"{path}{line}: no YAML ({error.problem}).") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply, or an alias in it stands for itself.") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that is none, or a date that is none
        raise error if str(path) in str(error) else InputError(f"{path}: no YAML ({first_line(error)}).") from None


def _count_values(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Values of a node where aliases are written out; each node is looked at once."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        below = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_count_values(child, sizes) for child in below)
    return sizes[id(node)]


def first_line(error: Exception) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_arrays(path: Path, limit: int = MAX_ARRAYS, scratch_dir: Path | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`; nothing in it is executed, and it is not unpacked if it says that it is huge.

    Args:
        path: the file.
        limit: bytes that all arrays together may take.
        scratch_dir: a folder on whose disk the arrays lie while they are in use; None: in memory.

    Raises:
        OSError: it cannot be read.
        ValueError: no whole archive of plain arrays, or a huge one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > limit:
                raise InputError(f"it unpacks to {size} bytes, more than {limit}")
            if scratch_dir is not None:
                names = archive.namelist()
                return {name.removesuffix(".npy"): _unpack_to_disk(archive, name, scratch_dir) for name in names}
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in file.files}
    # zipfile, zlib and NumPy's reader of headers end in many ways on a damaged file, such as a place before its start.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise InputError(f"{path} is no whole archive of arrays ({error or type(error).__name__}).") from error


def _unpack_to_disk(archive: zipfile.ZipFile, name: str, scratch_dir: Path) -> np.ndarray:
    """A member as `labn.io.memmap.write_npz` writes it, unpacked to disk block by block."""
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise InputError(f"{name} is of another version than this project's")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject or fortran or not shape:
            raise InputError(f"{name} is no table of plain numbers")
        wanted = math.prod(shape) * dtype.itemsize
        if not 0 <= wanted <= archive.getinfo(name).file_size:
            raise InputError(f"{name} is shorter than its shape")
        held = temporary_memmap(shape, dtype, scratch_dir)
        for rows in blocks(len(held)):
            data = file.read(held[rows].nbytes)
            held[rows] = np.frombuffer(data, dtype).reshape(held[rows].shape)
        # The end has to be asked for, because only there the checksum is compared.
        if file.read(1):
            raise InputError(f"{name} is longer than its shape")
        return held
