"""Splitting file records so that byte-identical images never end up on two sides."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from datamodules.base import OnBadImage
from datamodules.io.sources import Record, file_error
from labn.errors import InputError
from labn.io.images import BadImageError, identical_groups
from labn.io.readers import leaves_folder, non_utf8_name

AnyRecord = TypeVar("AnyRecord", bound=Record)


def readable_records(
    records: Sequence[AnyRecord],
    on_bad_image: OnBadImage,
    roots: Sequence[Path],
    check: Callable[[AnyRecord], str | None] = file_error,
) -> tuple[list[AnyRecord], list[str]]:
    """Check all files cheaply.

    Args:
        records: images with their masks.
        on_bad_image: "stop" or "skip".
        roots: folders of the data set; a link that leaves all of them is bad.
        check: gives a sentence about a bad file.

    Returns:
        The good records and a note for each bad one.

    Raises:
        BadImageError: a file is bad and `on_bad_image` is "stop".
    """
    good, notes = [], []
    real_roots = [os.path.realpath(root) for root in roots]
    for record in records:
        reason = _name_error(record) or _link_error(record, real_roots) or check(record)
        if reason and on_bad_image == "stop":
            raise BadImageError(f"{reason[:-1]}: replace it, or set on_bad_image: skip to leave the sample out.")
        if reason:
            notes.append(f"  skipped {non_utf8_name(record.name) or record.name}: {reason}")
        else:
            good.append(record)
    return good, notes


def _name_error(record: Record) -> str | None:
    shown = non_utf8_name(record.name)
    return shown and f"Image {shown} has a name that is not UTF-8 (rename it)."


def _link_error(record: Record, real_roots: Sequence[str]) -> str | None:
    for path in (record.path, *record.masks):
        if all(leaves_folder(path, root) for root in real_roots):
            return f"Image {path} is a link that leaves the data folder {real_roots[0]}."
    return None


def without_copies(records: Sequence[AnyRecord], held_out: Sequence[Record]) -> tuple[list[AnyRecord], list[str]]:
    """Leave out of `records` what is byte-identical to one of `held_out`.

    Returns:
        The records that stay and a note for each that leaves.
    """
    everything: list[Record] = [*held_out, *records]
    groups = identical_groups([r.path for r in everything])
    seen = dict(zip(groups, held_out))
    kept, notes = [], []
    for record, group in zip(records, groups[len(held_out) :]):
        if group in seen:
            notes.append(
                f"  left out of training: {record.name} (class {record.label}) is byte-identical to the held-out image "
                f"{seen[group].name} (class {seen[group].label})"
            )
        else:
            kept.append(record)
    return kept, notes


def split_off(
    records: Sequence[AnyRecord], fraction: float, seed: int
) -> tuple[list[AnyRecord], list[AnyRecord], list[str]]:
    """Split at random into (1 - fraction) and round(fraction * N) records; identical images stay together.

    Returns:
        The two parts, each in the order of `records`, and a note for each set of identical images.

    Raises:
        ValueError: `fraction` is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"The fraction to split off is {fraction}; it must lie between 0 and 1.")
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(identical_groups([r.path for r in records])):
        members[group].append(i)
    groups = list(members.values())
    wanted = round(fraction * len(records))
    chosen: set[int] = set()
    for g in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) + len(groups[g]) <= wanted:
            chosen.update(groups[g])
    rest = [r for i, r in enumerate(records) if i not in chosen]
    part = [r for i, r in enumerate(records) if i in chosen]
    return rest, part, [_note(records, g) for g in groups if len(g) > 1]


def _note(records: Sequence[Record], group: Sequence[int]) -> str:
    images = ", ".join(f"{records[i].name} (class {records[i].label})" for i in group)
    return f"  byte-identical, kept on the same side: {images}"
