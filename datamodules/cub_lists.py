"""The text files of CUB-200-2011: one line per image in each, joined by the image's number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from labn.reading import inside, read_text

Value = TypeVar("Value")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Bird:
    """One image of the lists.

    Attributes:
        path: the file, relative to the folder `images`.
        species: its class number, from 1 as in `classes.txt`.
        training: whether the official split has it in training.
        box: x and y of the upper left corner, width, height, in pixels of the file, decimals kept.
        where: file and line of the box, for errors that show once the image is read.
    """

    path: str
    species: int
    training: bool
    box: Box
    where: str


@dataclass(frozen=True)
class Column(Generic[Value]):
    """One list as read: number of the image (or class) -> its value, and -> the line that it stands in."""

    file: Path
    values: dict[int, Value]
    lines: dict[int, int]

    def where(self, number: int) -> str:
        """`<file>, line <n>` of an entry."""
        return f"{self.file}, line {self.lines[number]}"


def _text(rest: list[str]) -> str:
    return " ".join(rest)


def _whole(rest: list[str]) -> int:
    (value,) = map(int, rest)
    return value


def _flag(rest: list[str]) -> bool:
    return {"0": False, "1": True}[_text(rest)]


def _box(rest: list[str]) -> Box:
    x, y, width, height = map(float, rest)
    if not (width > 0 and height > 0 and all(map(math.isfinite, (x, y, width, height)))):
        raise ValueError("no area")
    return x, y, width, height


def read_column(file: Path, parse: Callable[[list[str]], Value], wanted: str) -> Column[Value]:
    """Read one list: on every line a number and what `parse` makes of the rest; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not `wanted`, or a number comes twice; the message names file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; `root` must hold CUB-200-2011 in its own layout.")
    column: Column[Value] = Column(file, {}, {})
    for line, text in enumerate(read_text(file).splitlines(), start=1):
        if not (words := text.split()):
            continue
        try:
            number, value = int(words[0]), parse(words[1:])
        except (ValueError, KeyError):
            raise ValueError(f"{file}, line {line}: '{text.strip()}' must be {wanted}.") from None
        if number in column.values:
            raise ValueError(
                f"{file}, line {line}: number {number} stands in line {column.lines[number]} already; "
                "every number needs exactly one line."
            )
        column.values[number], column.lines[number] = value, line
    return column


def read_classes(root: Path) -> dict[int, str]:
    """Class number -> class name, such as `001.Black_footed_Albatross`, from `classes.txt`."""
    return read_column(root / "classes.txt", _text, "a class number and its name").values


def read_birds(root: Path) -> list[Bird]:
    """All images of the lists, in the order of `images.txt`.

    Raises:
        FileNotFoundError: a list is missing.
        ValueError: a path that leaves the folder `images`, or the lists disagree: an image without label, split or box,
            an entry for an image that is not listed, a class that is not in `classes.txt`, or an image in the folder of
            another class than its label; the message names file and line.
    """
    names = read_classes(root)
    images = read_column(root / "images.txt", _text, "an image number and a path")
    labels = read_column(root / "image_class_labels.txt", _whole, "an image number and a class number")
    training = read_column(root / "train_test_split.txt", _flag, "an image number and 0 (test) or 1 (training)")
    boxes = read_column(
        root / "bounding_boxes.txt", _box, "an image number and x, y, width, height in pixels with an area"
    )
    others: tuple[Column[Any], ...] = (labels, training, boxes)
    for other in others:
        _same_images(images, other)
    for number, name in images.values.items():
        inside(root / "images", name, images.where(number))
        _right_folder(number, images, labels, names)
    return [
        Bird(path, labels.values[n], training.values[n], boxes.values[n], boxes.where(n))
        for n, path in images.values.items()
    ]


def _same_images(images: Column[str], other: Column[Any]) -> None:
    if missing := [number for number in images.values if number not in other.values]:
        raise ValueError(
            f"{images.where(missing[0])}: image {missing[0]} ({images.values[missing[0]]}) has no line in "
            f"{other.file} ({len(missing)} such images)."
        )
    if foreign := [number for number in other.values if number not in images.values]:
        raise ValueError(
            f"{other.where(foreign[0])}: image {foreign[0]} is not listed in {images.file} ({len(foreign)} such lines)."
        )


def _right_folder(number: int, images: Column[str], labels: Column[int], names: dict[int, str]) -> None:
    species = labels.values[number]
    if species not in names:
        raise ValueError(f"{labels.where(number)}: class {species} is not listed in {labels.file.parent}/classes.txt.")
    if Path(images.values[number]).parts[0] != names[species]:
        raise ValueError(
            f"{images.where(number)}: {images.values[number]} is not in the folder of class {species}, "
            f"'{names[species]}', which {labels.where(number)} gives it."
        )
