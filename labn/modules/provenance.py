"""The data that a checkpoint was trained on, compared with the data that it is used with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from labn.errors import InputError
from labn.io.preprocessing import KEY

TRAINED_ON = "training_data"
"""Key of a checkpoint: the data hash of the training split."""


def training_hash(data: Any) -> str | None:
    """The data hash of a data module's training split; None where it has none."""
    fingerprint = getattr(data, "fingerprint", None)
    return fingerprint("train") if fingerprint is not None and "train" in getattr(data, "splits", ()) else None


def check_trained_on(checkpoint: dict[str, Any], data: Any, path: Any = "") -> None:
    """Warn if a checkpoint's classes, preprocessing or training images are not those of the data module.

    Classes are labels by their order: a folder that is renamed, added or removed moves the labels of others. Random
    splits move images between training and test when an image is added or removed.

    Args:
        checkpoint: its content.
        data: the data module.
        path: the file, for the message.

    Raises:
        InputError: a class has another label in the data than in the checkpoint.
    """
    stored = checkpoint.get(KEY)
    if not isinstance(stored, dict) or not hasattr(data, "preprocessing"):
        return
    current = data.preprocessing().plain()
    _check_classes(stored.get("class_names") or [], current["class_names"], f"{path} " if path else "")
    changed = [name for name in current if name in stored and name != "class_names" and stored[name] != current[name]]
    if changed:
        shown = ", ".join(f"{name} {stored[name]}, now {current[name]}" for name in changed)
        rank_zero_warn(
            f"The checkpoint was trained on images that were prepared in another way: {shown}; set these arguments of "
            "the data to test it on images like those of its training."
        )
    elif stored.get("class_names") == current["class_names"]:
        _check_images(checkpoint.get(TRAINED_ON), training_hash(data))


def _check_classes(stored: Sequence[Any], current: Sequence[str], file: str) -> None:
    names = [", ".join(map(str, each)) for each in (stored, current)]
    if not stored or names[0] == names[1]:
        return
    shared = [str(name) for name in stored if name in current]
    if moved := [name for name in shared if stored.index(name) != current.index(name)]:
        raise InputError(
            f"The checkpoint {file}was trained on the classes {names[0]}; those of the data are {names[1]}, where "
            f"{moved[0]} has another label: {current.index(moved[0])}, not {stored.index(moved[0])}."
        )
    rank_zero_warn(f"The checkpoint {file}was trained on the classes {names[0]}; those of the data are {names[1]}.")


def _check_images(stored: Any, current: str | None) -> None:
    if isinstance(stored, str) and current is not None and stored != current:
        rank_zero_warn(
            f"The checkpoint was trained on another training split (data hash {stored}, now {current}): if images "
            "were added or removed, a random split has moved others, and the test may have images that the "
            "network has seen."
        )
