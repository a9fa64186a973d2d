"""File names of shards, and an index that finds the shards of a sample by file name alone.

A shard is named `<explainer>.<key>.<first>-<last>.<rest>`, where `first` and `last` are its smallest and largest sample
index; samples in between may belong to shards of other ranks. A folder of 10^6 shards is listed once, no file is
opened, and a look-up takes two binary searches.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np

LONGEST = 120
"""Maximum bytes of a readable name. File systems allow 255 per file name, which also contains an index and a suffix."""

# Separators of folders and characters that are special in a shell or forbidden on Windows.
_SPECIAL = frozenset("/\\ %:*?\"'<>|$&;`!#~")

_NAME = re.compile(r"([^.]+)\.([^.]+)\.(\d+)-(\d+)\.(.+)")


def file_name(name: str) -> str:
    """The name of an explainer, percent-encoded and without dots, as the first field of a file name."""
    return quote(name, safe="+-").replace(".", "%2E")


def readable_name(name: str) -> str:
    """The name of a sample or picture in a form that is safe inside a file name, at most `LONGEST` bytes in UTF-8.

    Letters of any script stay. Separators of folders, unprintable characters, characters that are special in a shell,
    and a leading dot become `_`. A longer name is cut and ends with a hash of the whole name. Different names may give
    the same result, so that the caller must add an index or check for duplicates.
    """
    safe = "".join(c if c.isprintable() and c not in _SPECIAL else "_" for c in name)
    safe = f"_{safe[1:]}" if safe.startswith(".") else safe
    if len(safe.encode()) <= LONGEST:
        return safe
    # surrogatepass: names from a file system that are not valid UTF-8 hold lone surrogates.
    ending = "-" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    # A cut in the middle of a character leaves bytes that `errors="ignore"` drops.
    return safe.encode()[: LONGEST - len(ending)].decode(errors="ignore") + ending


def shard_name(explainer: str, key: str, indices: list[int], rest: str) -> str:
    """File name of a shard with the samples `indices`; `rest` holds the rank and the suffix."""
    return f"{file_name(explainer)}.{key}.{min(indices):07d}-{max(indices):07d}.{rest}"


class ShardIndex:
    """Index of the shards in a folder at the time of construction.

    Args:
        folder: the folder; it need not exist.
        suffix: suffix of the shards; other files and temporary files are ignored.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder = folder
        shards: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for name in os.listdir(folder) if folder.is_dir() else ():
            match = _NAME.fullmatch(name) if name.endswith(suffix) and not name.startswith(".") else None
            if match:
                explainer, key, first, last, rest = match.groups()
                # Interned, because there may be 10^6 files but few different strings.
                entry = (int(first), int(last), sys.intern(rest))
                shards.setdefault((sys.intern(explainer), sys.intern(key)), []).append(entry)
        self._groups = {group: _Ranges(sorted(entries)) for group, entries in sorted(shards.items())}

    def holding(self, explainer: str, key: str, indices: set[int]) -> list[Path]:
        """Paths of the shards of an explainer whose range contains one of `indices`, sorted by name."""
        group = (file_name(explainer), key)
        ranges = self._groups.get(group)
        return [] if ranges is None or not indices else self._paths(group, ranges, ranges.touching(indices))

    def all(self) -> list[Path]:
        """Paths of all shards, sorted by name."""
        return [
            p for group, ranges in self._groups.items() for p in self._paths(group, ranges, range(len(ranges.rest)))
        ]

    def _paths(self, group: tuple[str, str], ranges: _Ranges, numbers: range | list[int]) -> list[Path]:
        start = ".".join(group)
        return [self.folder / f"{start}.{ranges.first[n]:07d}-{ranges.last[n]:07d}.{ranges.rest[n]}" for n in numbers]


class _Ranges:
    """Ranges of sample indices, sorted by their first index; arrays, because there may be millions of ranges."""

    def __init__(self, entries: list[tuple[int, int, str]]) -> None:
        self.first = np.array([first for first, _, _ in entries], dtype=np.int64)
        self.last = np.array([last for _, last, _ in entries], dtype=np.int64)
        self.rest = [rest for _, _, rest in entries]
        # The largest last index up to each range. Unlike `last` it never decreases, so that it can be bisected.
        self._reach = np.maximum.accumulate(self.last)

    def touching(self, indices: set[int]) -> list[int]:
        """Numbers of the ranges that contain one of `indices`, which must not be empty."""
        wanted = np.sort(np.fromiter(indices, dtype=np.int64))
        start = int(np.searchsorted(self._reach, wanted[0]))
        end = int(np.searchsorted(self.first, wanted[-1], side="right"))
        # A range contains a wanted index iff the smallest one that is >= its first index is <= its last.
        following = np.searchsorted(wanted, self.first[start:end])
        inside = wanted[np.minimum(following, len(wanted) - 1)] <= self.last[start:end]
        return (start + np.flatnonzero(inside)).tolist()
