"""Splits of a data set: their names, checks of their files, and random splits that keep identical images together."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from datamodules.io.sources import Record, file_error
from labn.errors import InputError
from labn.io.images import BadImageError, identical_groups
from labn.io.readers import leaves_folder, non_utf8_name

Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")

OnBadImage = Literal["stop", "skip"]
"""A damaged file raises an error, or its sample is left out with a note."""

AnyRecord = TypeVar("AnyRecord", bound=Record)


def readable_records(
    records: Sequence[AnyRecord],
    on_bad_image: OnBadImage,
    roots: Sequence[Path],
    check: Callable[[AnyRecord], str | None] = file_error,
) -> tuple[list[AnyRecord], list[str]]:
    """Check the files of all records without decoding them where the format allows it.

    Args:
        records: images with their masks.
        on_bad_image: "stop" raises at the first damaged file; "skip" leaves its record out.
        roots: folders of the data set; a link whose target lies outside all of them counts as damaged.
        check: returns one sentence about a damaged file of a record, or None.

    Returns:
        The readable records, and a note for each of the others.

    Raises:
        BadImageError: a file is damaged and `on_bad_image` is "stop".
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
    """Leave out the records whose image is byte-identical to an image of `held_out`.

    Returns:
        The remaining records, and a note for each record that was left out.
    """
    everything: list[Record] = [*held_out, *records]
    groups = identical_groups([r.path for r in everything])
    originals = dict(zip(groups, held_out))
    remaining, notes = [], []
    for record, group in zip(records, groups[len(held_out) :]):
        if group in originals:
            notes.append(
                f"  left out of training: {record.name} (class {record.label}) is byte-identical to the held-out image "
                f"{originals[group].name} (class {originals[group].label})"
            )
        else:
            remaining.append(record)
    return remaining, notes


def split_off(
    records: Sequence[AnyRecord], fraction: float, seed: int
) -> tuple[list[AnyRecord], list[AnyRecord], list[str]]:
    """Split off round(fraction * N) of N records at random (seeded); byte-identical images stay on one side.

    Returns:
        The remaining records, those split off, each in the order of `records`, and a note for each set of identical
        images.

    Raises:
        InputError: `fraction` is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"The fraction to split off is {fraction}; it must lie between 0 and 1.")
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(identical_groups([r.path for r in records])):
        members[group].append(i)
    groups = list(members.values())
    count = round(fraction * len(records))
    chosen: set[int] = set()
    # Whole groups of identical images are drawn; one that would exceed the count is passed over.
    for g in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) + len(groups[g]) <= count:
            chosen.update(groups[g])
    rest = [r for i, r in enumerate(records) if i not in chosen]
    split = [r for i, r in enumerate(records) if i in chosen]
    return rest, split, [_note(records, g) for g in groups if len(g) > 1]


def _note(records: Sequence[Record], group: Sequence[int]) -> str:
    images = ", ".join(f"{records[i].name} (class {records[i].label})" for i in group)
    return f"  byte-identical, kept on the same side: {images}"
