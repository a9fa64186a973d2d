"""Matching of two sets of photographs by their pixels, for data sets that number the same photographs differently."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labn.errors import InputError
from labn.io.atomic import write_atomically
from labn.io.images import content_hash, digest, identical_groups, read_image, squash
from labn.io.readers import read_json

THUMBNAIL = 64
"""Side of the thumbnails in pixels."""

MAX_DIFFERENCE = 1.0
"""Largest mean absolute difference in grey levels (0 to 255) of two thumbnails of one photograph.

Copies of IDRiD's photographs at other sizes and JPEG qualities differ by at most 0.5; different exposures of one eye
differ by 2, other eyes by more than 4.
"""

MIN_MARGIN = 2.0
"""The second best photograph must differ by at least this many times the difference of the best one, and by more than
`MAX_DIFFERENCE`."""


@dataclass(frozen=True)
class PhotoMatches:
    """Result of a comparison of photographs.

    Attributes:
        matched: position of a photograph -> positions of the same photograph among the candidates, more than one where
            candidates are byte-identical.
        missing: positions of photographs that no candidate shows.
        ambiguous: positions of photographs that several different candidates could be.
    """

    matched: dict[int, list[int]]
    missing: list[int]
    ambiguous: list[int]


def thumbnail(path: Path) -> np.ndarray[Any, Any]:
    """Grey thumbnail (THUMBNAIL^2,) float32 of an image, by area averages."""
    return squash(read_image(path, 1), THUMBNAIL).astype(np.float32).ravel()


def match_photographs(photos: Sequence[Path], candidates: Sequence[Path]) -> PhotoMatches:
    """Find the candidate that shows the same photograph as each of `photos`, at any size.

    Two files show one photograph if the mean absolute difference of their thumbnails is at most MAX_DIFFERENCE and
    clearly below that of every other photograph.

    Example:
        >>> import cv2, tempfile
        >>> rng = np.random.default_rng(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [Path(folder) / f"{number}.png" for number in range(3)]
        ...     for file in files[:2]:
        ...         _ = cv2.imwrite(str(file), rng.integers(0, 256, (64, 64), dtype=np.uint8))
        ...     _ = cv2.imwrite(str(files[2]), cv2.resize(cv2.imread(str(files[1])), (128, 128), interpolation=0))
        ...     match_photographs(files[2:], files[:2]).matched
        {0: [1]}
    """
    with ThreadPoolExecutor(4) as pool:  # OpenCV releases the interpreter lock while it decodes
        wanted, offered = (list(pool.map(thumbnail, files)) for files in (photos, candidates))
    groups = np.array(identical_groups(candidates))
    result = PhotoMatches({}, [], [])
    table = np.stack(offered) if offered else np.empty((0, THUMBNAIL**2), np.float32)
    for number, pixels in enumerate(wanted):
        differences = np.abs(table - pixels).mean(1)
        if not len(differences) or differences.min() > MAX_DIFFERENCE:
            result.missing.append(number)
            continue
        best = int(differences.argmin())
        # Copies of the best candidate are the same photograph and no rivals.
        rivals = differences[groups != groups[best]]
        if len(rivals) and rivals.min() < max(MIN_MARGIN * differences[best], MAX_DIFFERENCE):
            result.ambiguous.append(number)
        else:
            result.matched[number] = np.flatnonzero(groups == groups[best]).tolist()
    return result


def cached_matches(photos: Sequence[Path], candidates: Sequence[Path], cache_dir: Path) -> PhotoMatches:
    """`match_photographs`, computed once and stored in `cache_dir` under a hash of all files."""
    settings = [THUMBNAIL, MAX_DIFFERENCE, MIN_MARGIN, len(photos)]
    path = cache_dir / f"photographs_{digest([*settings, *map(content_hash, [*photos, *candidates])])}.json"
    if path.is_file():
        try:
            return _from_json(read_json(path, dict))
        except (InputError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}); the photographs are compared again.", stacklevel=2)
    matches = match_photographs(photos, candidates)
    try:
        write_atomically(path, json.dumps(vars(matches)).encode())
    except OSError as error:
        advice = "Set data.init_args.cache_dir to another folder; the run continues."
        warnings.warn(f"{error.strerror} {advice}", stacklevel=2)
    return matches


def _from_json(content: dict[str, Any]) -> PhotoMatches:
    matched = {int(number): [int(n) for n in found] for number, found in content["matched"].items()}
    return PhotoMatches(matched, list(map(int, content["missing"])), list(map(int, content["ambiguous"])))
