"""Readers of tables, JSON, YAML and arrays that are safe for damaged or hostile files.

Every error is one sentence that names the file and, in text files, the line.
"""

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
from labn.io.table_cells import unescaped_cell

Value = TypeVar("Value")

MAX_TEXT = 2**31
"""Largest size in bytes of a text file that is read into memory."""

MAX_ARRAYS = 2**34
"""Largest size in bytes of the unpacked arrays of one `.npz`."""

MAX_YAML, MAX_NODES = 2**24, 100_000
"""Largest size in bytes of a YAML file, and largest number of its values with all aliases expanded."""

# An absolute path, a drive letter, a component `..`, or a control character.
_OUTSIDE = re.compile(r"^[\\/]|^[A-Za-z]:|(^|[\\/])\.\.([\\/]|$)|[\x00-\x1f]")


def path_inside(root: Path, name: str, where: str, strict_links: bool = True) -> Path:
    """The path `root / name`, which must lie in `root`, also after links are followed.

    Args:
        root: a folder.
        name: a path from a table or list.
        where: file and line of `name`, for the message.
        strict_links: whether a link may not lead out of `root`; False allows folders that are linked to another disk.

    Raises:
        InputError: `name` is empty or absolute, has a component `..`, control characters or a component that is too
            long for a file name, or a link in it leads out of `root`.

    Example:
        >>> path_inside(Path("data"), "../secret.png", "list.txt, line 3")
        Traceback (most recent call last):
        labn.errors.InputError: list.txt, line 3: '../secret.png' must be a path inside data, ...
    """
    if not name.strip() or _OUTSIDE.search(name) or any(len(os.fsencode(word)) > 255 for word in name.split("/")):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise InputError(f"{where}: {shown!r} must be a path inside {root}, without '..' and not absolute.")
    if strict_links and leaves_folder(root / name, os.path.realpath(root)):
        raise InputError(f"{where}: {name!r} is a link that leaves {root}; put the file itself there.")
    return root / name


def non_utf8_name(name: str) -> str | None:
    """A file name that is not UTF-8, with its bytes escaped (`caf\\xe9.png`); None for a name in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return None


def leaves_folder(path: Path, real_root: str) -> bool:
    """Whether `path`, with links followed, lies outside `real_root`, a path without links."""
    real = os.path.realpath(path)
    return real != real_root and not real.startswith(real_root.rstrip(os.sep) + os.sep)


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        limit: largest size in bytes.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is larger than `limit`, or is not UTF-8 (the message names the line).
    """
    if path.stat().st_size > limit:
        raise InputError(f"{path} is larger than {limit} bytes; give a smaller file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise InputError(f"{path}, line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8.") from None
    if "\0" in text:  # UTF-16 without a byte order mark decodes with these between the letters
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise InputError(f"{path}, line {line}: byte 0x00 is not text; save the file as UTF-8.")
    return text


@dataclass(frozen=True)
class TableRow:
    """One row of a CSV file.

    Attributes:
        where: `<file>, line <n>`, for messages.
        cells: column -> text; empty where the row has too few cells.
    """

    where: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def number(self, column: str, kind: Callable[[str], Value]) -> Value:
        """A cell as `int` or `float`.

        Raises:
            InputError: the cell is not such a number.
        """
        try:
            return kind(self.cells[column])
        except (ValueError, OverflowError):
            what = "an integer" if kind is int else "a number"
            raise InputError(f"{self.where}: {column} is {self.cells[column][:100]!r}; it must be {what}.") from None


def whole_number(word: str) -> int | None:
    """The non-negative integer that a word of decimal digits means; None for other words, and beyond 18 digits.

    Python itself refuses to convert numbers of thousands of digits, with an error that names no file.

    Example:
        >>> whole_number("042"), whole_number("-1"), whole_number("9" * 5000)
        (42, None, None)
    """
    return int(word) if word.isdecimal() and len(word) <= 18 else None


def read_rows(path: Path, escaped: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row of a CSV file, one row at a time.

    Args:
        path: the file.
        escaped: whether this project has written the file, see `labn.io.table_cells`; cells are then exactly what was
            written. Cells of other files lose surrounding spaces.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is not UTF-8 or not CSV; the message names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if any("\0" in cell for cell in row):
                    raise InputError(f"{path}, line {reader.line_num}: byte 0x00 is not text; save the file as UTF-8.")
                yield reader.line_num, [unescaped_cell(cell) if escaped else cell.strip() for cell in row]
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({error}); repair the line.") from None
        except UnicodeDecodeError:
            # The file is decoded ahead of the reader, whose line number is too small; `read_text` finds the line.
            read_text(path)
            raise


def read_table(path: Path, columns: Sequence[str] = (), escaped: bool = False) -> Iterator[TableRow]:
    """The rows of a CSV file with a header, one at a time; empty rows are skipped.

    Args:
        path: the file.
        columns: columns that the header must have.
        escaped: see `read_rows`.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is not UTF-8 or not CSV, or a column is missing; the message names the line.
    """
    rows = read_rows(path, escaped)
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
    """Read a JSON file whose content is a `dict` or a `list`, as `kind` says.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is not JSON (the message names the line), or its content is of another kind.
    """
    try:
        content: Any = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}); repair the file.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply; give a file with fewer levels.") from None
    except ValueError as error:  # not UTF-8, where the message names the file, or a number with thousands of digits
        raise error if str(path) in str(error) else InputError(f"{path}: not JSON ({error}); repair it.") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} holds a {type(content).__name__}; it must hold a {kind.__name__}.")
    return content


def read_yaml(path: Path, limit: int | None = None) -> Any:
    """Read a YAML file of plain values; no object is built from it.

    The values are counted, with aliases expanded, before the file is constructed: nine lines of ten aliases each expand
    to 10^9 values (the "billion laughs" attack).

    Args:
        path: the file.
        limit: largest number of values with every alias expanded; MAX_NODES by default.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is not YAML (the message names the line), or has too many values.
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
        raise InputError(f"{path}{line}: not YAML ({error.problem}); repair the file.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply, or an alias in it stands for itself.") from None
    except (yaml.YAMLError, ValueError) as error:  # an invalid character, or an invalid date
        raise error if str(path) in str(error) else InputError(f"{path}: not YAML ({first_line(error)}).") from None


def _count_values(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Number of values of a node with aliases expanded; `sizes` holds the counts of nodes that were visited."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        below = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_count_values(child, sizes) for child in below)
    return sizes[id(node)]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_arrays(path: Path, limit: int = MAX_ARRAYS, scratch_dir: Path | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an `.npz` without unpickling; the declared size is checked before anything is unpacked.

    Args:
        path: the file.
        limit: largest size in bytes of all arrays together.
        scratch_dir: folder for temporary files that the arrays are mapped from; None reads them into memory.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is damaged, too large, or has other members than plain arrays.
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
    # zipfile, zlib and NumPy raise many kinds of errors for damaged files, among them OSError with EINVAL for a
    # negative position.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise InputError(f"{path} is not a complete archive of arrays ({error or type(error).__name__}).") from error


def _unpack_to_disk(archive: zipfile.ZipFile, name: str, scratch_dir: Path) -> np.ndarray:
    """Unpack a member that `labn.io.memmap.write_npz` wrote to a temporary file, block by block."""
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise InputError(f"{name} has a .npy version other than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject or fortran or not shape:
            raise InputError(f"{name} is not a C-ordered array of numbers")
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= archive.getinfo(name).file_size:
            raise InputError(f"{name} is shorter than its shape")
        array = temporary_memmap(shape, dtype, scratch_dir)
        for block in blocks(len(array)):
            data = file.read(array[block].nbytes)
            array[block] = np.frombuffer(data, dtype).reshape(array[block].shape)
        # zipfile compares the checksum only when a read reaches the end of the member.
        if file.read(1):
            raise InputError(f"{name} is longer than its shape")
        return array
