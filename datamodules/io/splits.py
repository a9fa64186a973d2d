"""Splits of a data set: their names, checks of their files, and random splits that keep identical images together."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
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

MAX_LISTED_FILES = 20
"""Largest number of damaged files that one error message names."""

AnyRecord = TypeVar("AnyRecord", bound=Record)


def readable_records(
    records: Sequence[AnyRecord],
    on_bad_image: OnBadImage,
    roots: Sequence[Path],
    check: Callable[[AnyRecord], str | None] = file_error,
    strict_links: bool = False,
) -> tuple[list[AnyRecord], list[str]]:
    """Check the files of all records, without decoding images whose format has checksums or end markers.

    Args:
        records: images with their masks.
        on_bad_image: "stop" raises one error that lists all damaged files; "skip" leaves their records out.
        roots: folders of the data set, for the check of links that leave them.
        check: returns one sentence about a damaged file of a record, or None.
        strict_links: whether every link that leaves all of `roots` counts as damaged; by default only a link to a file
            that is not an image does, so that folders on another disk can be linked.

    Returns:
        The readable records, and a note for each of the others.

    Raises:
        BadImageError: files are damaged and `on_bad_image` is "stop".
    """
    good, notes, reasons = [], [], []
    real_roots = [os.path.realpath(root) for root in roots]
    for record in records:
        damage = None if (name := _name_error(record)) else check(record)
        # A damaged file behind a link gets the message about the link, which shows nothing of the file's content.
        link = _link_error(record, real_roots) if strict_links or damage else None
        if reason := name or link or damage:
            reasons.append(reason)
            notes.append(f"  skipped {non_utf8_name(record.name) or record.name}: {reason}")
        else:
            good.append(record)
    if reasons and on_bad_image == "stop":
        raise BadImageError(_all_reasons(reasons))
    return good, notes


def _all_reasons(reasons: Sequence[str]) -> str:
    if len(reasons) == 1:
        return f"{reasons[0][:-1]}: replace it, or set on_bad_image: skip to leave the sample out."
    shown = [reason[:-1] for reason in reasons[:MAX_LISTED_FILES]]
    more = [f"and {len(reasons) - len(shown)} more"] if len(reasons) > len(shown) else []
    listed = "; ".join([*shown, *more])
    return (
        f"{len(reasons)} images cannot be read ({listed}): replace them, or set on_bad_image: skip to leave them out."
    )


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
    records: Sequence[AnyRecord], fraction: float, seed: int, stratified: bool = False
) -> tuple[list[AnyRecord], list[AnyRecord], list[str]]:
    """Split off round(fraction * N) of N records at random (seeded); byte-identical images stay on one side.

    Args:
        records: N images.
        fraction: share to split off, between 0 and 1.
        seed: seed of the random order.
        stratified: whether every class gives the same share, up to rounding; a class of at least two images gives at
            least one and keeps at least one, so that the number of records may differ from round(fraction * N).

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
    labels = [r.label for r in records] if stratified else [0] * len(records)
    free = _quotas(labels, fraction, at_least_one=stratified)
    chosen: set[int] = set()
    # Whole groups of identical images are drawn; one that would exceed the quota of a class is passed over.
    for g in np.random.default_rng(seed).permutation(len(groups)):
        needed = Counter(labels[i] for i in groups[g])
        if all(number <= free[label] for label, number in needed.items()):
            free -= needed
            chosen.update(groups[g])
    rest = [r for i, r in enumerate(records) if i not in chosen]
    split = [r for i, r in enumerate(records) if i in chosen]
    return rest, split, [_note(records, g) for g in groups if len(g) > 1]


def _quotas(labels: Sequence[int], fraction: float, at_least_one: bool) -> Counter[int]:
    """Number of images that each class gives, with the sum round(fraction * N) by the largest remainders (Hamilton)."""
    sizes = Counter(labels)
    exact = {label: fraction * size for label, size in sorted(sizes.items())}
    quotas = Counter({label: math.floor(share) for label, share in exact.items()})
    by_remainder = sorted(exact, key=lambda label: quotas[label] - exact[label])
    for label in by_remainder[: round(fraction * len(labels)) - quotas.total()]:
        quotas[label] += 1
    if at_least_one:
        # A class that gives no image has no test score, and one that gives all of them cannot be learned.
        quotas = Counter({label: min(max(quotas[label], 1), size - 1) for label, size in sizes.items()})
    return quotas


def _note(records: Sequence[Record], group: Sequence[int]) -> str:
    images = ", ".join(f"{records[i].name} (class {records[i].label})" for i in group)
    return f"  byte-identical, kept on the same side: {images}"
