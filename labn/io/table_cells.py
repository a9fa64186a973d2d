"""Cells of tables that people open with spreadsheets: a text must not become a formula.

A text that begins with `=`, `+`, `-`, `@`, a tab or a line break gets an apostrophe in front, which spreadsheets show
as part of the text. Numbers stay numbers, and so does the name of a negated method (`-labn`) in a column of methods: it
calculates nothing. `labn.results.reader` removes the apostrophe again.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from labn.io.atomic import written_atomically

# The full-width forms count as well, in programs for Chinese and Japanese.
_FORMULA = re.compile("'*[=+\\-@\\t\\r\\n＝＋－＠]")


def escaped_cell(value: Any) -> Any:
    """A value of a table as it is written: texts that a spreadsheet would calculate begin with an apostrophe.

    Floats are written with the fewest digits that read back as the same number.

    Example:
        >>> [escaped_cell(value) for value in ("=1+1", "-labn", "'=x", "cat", "-0.5", -0.5, 3)]
        ["'=1+1", "'-labn", "''=x", 'cat', '-0.5', '-0.5', 3]
    """
    if isinstance(value, float):
        return repr(value)
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value) else value


def escaped_method(value: Any) -> Any:
    """A cell in a column of methods: as `escaped_cell`, but the name of a negated method stays as it is.

    Example:
        >>> [escaped_method(value) for value in ("-labn", "-gradcam++", "gradcam", "-1+cmd|x", "=x")]
        ['-labn', '-gradcam++', 'gradcam', "'-1+cmd|x", "'=x"]
    """
    negated = isinstance(value, str) and re.fullmatch(r"-[A-Za-z]\w*(\+\+)?", value)
    return value if negated else escaped_cell(value)


def unescaped_cell(text: str) -> str:
    """The text that `escaped_cell` was given.

    Example:
        >>> [unescaped_cell(text) for text in ("'=1+1", "''=x", "-0.5", "'tis")]
        ['=1+1', "'=x", '-0.5', "'tis"]
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _is_number(text: str) -> bool:
    """Whether a text is a number, such as the cell of a table that is read and written again."""
    with suppress(ValueError):
        float(text)
        return True
    return False


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows as CSV with a header; floats with all their digits, and no text that a spreadsheet takes for a formula."""
    text = io.StringIO()
    write_rows(text, header, rows)
    return text.getvalue().encode()


def write_rows(text: TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header and rows as CSV, one by one."""
    plain = csv.writer(text, lineterminator="\n")
    # The module quotes cells with a carriage return in some versions of Python only.
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    escape = [escaped_method if name.startswith("explainer") else escaped_cell for name in header]
    for row in itertools.chain([header], rows):
        cells = [write(value) for write, value in zip(escape, row, strict=True)]
        (quoted if any(isinstance(cell, str) and "\r" in cell for cell in cells) else plain).writerow(cells)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table that may be larger than memory; the file appears under its name when it is complete."""
    with written_atomically(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        write_rows(text, header, rows)
        text.detach()  # flushes, and leaves the file open for written_atomically
