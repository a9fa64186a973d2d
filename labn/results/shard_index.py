"""Names of files in a results folder, and which of its shards may hold a sample, told from their names alone.

A shard is called `<explainer>.<key>.<first>-<last>.<rest>`: between its smallest and its largest sample index there may
be others, of other ranks. A folder of 10^6 records is listed once, no file is opened, and a look-up is two binary
searches.
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
"""Bytes of a readable name; a file name has 255, for what stands before and behind it too."""

_SPECIAL = frozenset("/\\ %:*?\"'<>|$&;`!#~")

_NAME = re.compile(r"([^.]+)\.([^.]+)\.(\d+)-(\d+)\.(.+)")


def file_name(name: str) -> str:
    """`name` of an explainer as the first, dot-free field of a file name."""
    return quote(name, safe="+-").replace(".", "%2E")


def readable_name(name: str) -> str:
    """`name` of a sample or picture as a part of a file name, of at most `LONGEST` bytes in UTF-8.

    Letters of any script stay; what separates folders, cannot be printed or is special in a shell becomes `_`, as does
    a dot in front. A longer name keeps its beginning, followed by a hash of all of it. Different names may become the
    same: an index beside it, or a check, must tell them apart.
    """
    kept = "".join(c if c.isprintable() and c not in _SPECIAL else "_" for c in name)
    kept = f"_{kept[1:]}" if kept.startswith(".") else kept
    if len(kept.encode()) <= LONGEST:
        return kept
    ending = "-" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    return kept.encode()[: LONGEST - len(ending)].decode(errors="ignore") + ending


def shard_name(explainer: str, key: str, indices: list[int], rest: str) -> str:
    """File name of a shard with the samples `indices`."""
    return f"{file_name(explainer)}.{key}.{min(indices):07d}-{max(indices):07d}.{rest}"


class ShardIndex:
    """The shards of one folder, as it is when this is made.

    Args:
        folder: it need not exist.
        suffix: of the files to consider; others, and those still being written, are not shards.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder = folder
        found: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for name in os.listdir(folder) if folder.is_dir() else ():
            match = _NAME.fullmatch(name) if name.endswith(suffix) and not name.startswith(".") else None
            if match:
                explainer, key, first, last, rest = match.groups()
                entry = (int(first), int(last), sys.intern(rest))
                found.setdefault((sys.intern(explainer), sys.intern(key)), []).append(entry)
        self._groups = {group: _Ranges(sorted(entries)) for group, entries in sorted(found.items())}

    def holding(self, explainer: str, key: str, indices: set[int]) -> list[Path]:
        """Shards of an explainer in whose range one of `indices` lies, in order of their names."""
        group = (file_name(explainer), key)
        ranges = self._groups.get(group)
        return [] if ranges is None or not indices else self._paths(group, ranges, ranges.touching(indices))

    def all(self) -> list[Path]:
        """Every shard, in order of their names."""
        return [
            p for group, ranges in self._groups.items() for p in self._paths(group, ranges, range(len(ranges.rest)))
        ]

    def _paths(self, group: tuple[str, str], ranges: _Ranges, places: range | list[int]) -> list[Path]:
        start = ".".join(group)
        return [self.folder / f"{start}.{ranges.first[n]:07d}-{ranges.last[n]:07d}.{ranges.rest[n]}" for n in places]


class _Ranges:
    """Ranges of indices in order of their beginnings, as arrays, because there may be millions of them."""

    def __init__(self, entries: list[tuple[int, int, str]]) -> None:
        self.first = np.array([first for first, _, _ in entries], dtype=np.int64)
        self.last = np.array([last for _, last, _ in entries], dtype=np.int64)
        self.rest = [rest for _, _, rest in entries]
        self._reach = np.maximum.accumulate(self.last)

    def touching(self, indices: set[int]) -> list[int]:
        """Places of the ranges that one of `indices` lies in."""
        wanted = np.sort(np.fromiter(indices, dtype=np.int64))
        start = int(np.searchsorted(self._reach, wanted[0]))
        end = int(np.searchsorted(self.first, wanted[-1], side="right"))
        # The smallest wanted index that is not before the range must not be behind it.
        places = np.searchsorted(wanted, self.first[start:end])
        inside = wanted[np.minimum(places, len(wanted) - 1)] <= self.last[start:end]
        return (start + np.flatnonzero(inside)).tolist()
