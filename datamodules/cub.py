"""CUB-200-2011 (Wah et al., Caltech technical report 2011): 200 kinds of birds with boxes, in its own layout."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from datamodules.base import ImageDataModule, OnBadImage, Split, data_root
from datamodules.io.sources import Record, Source
from datamodules.io.splits import readable_records, split_off, without_copies
from datamodules.io.transforms import Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import content_hash, read_image, resize_short_side
from labn.io.readers import path_inside, read_text

Value = TypeVar("Value")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BirdImage:
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
class NumberedList(Generic[Value]):
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
        raise InputError("no area")
    return x, y, width, height


def read_list(file: Path, parse: Callable[[list[str]], Value], wanted: str) -> NumberedList[Value]:
    """Read one list: on every line a number and what `parse` makes of the rest; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not `wanted`, or a number comes twice; the message names file and line.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; `root` must hold CUB-200-2011 in its own layout.")
    column: NumberedList[Value] = NumberedList(file, {}, {})
    for line, text in enumerate(read_text(file).splitlines(), start=1):
        if not (words := text.split()):
            continue
        try:
            number, value = int(words[0]), parse(words[1:])
        except (ValueError, KeyError):
            raise InputError(f"{file}, line {line}: '{text.strip()}' must be {wanted}.") from None
        if number in column.values:
            raise InputError(
                f"{file}, line {line}: number {number} stands in line {column.lines[number]} already; "
                "every number needs exactly one line."
            )
        column.values[number], column.lines[number] = value, line
    return column


def read_classes(root: Path) -> dict[int, str]:
    """Class number -> class name, such as `001.Black_footed_Albatross`, from `classes.txt`."""
    return read_list(root / "classes.txt", _text, "a class number and its name").values


def read_birds(root: Path) -> list[BirdImage]:
    """All images of the lists, in the order of `images.txt`.

    Raises:
        FileNotFoundError: a list is missing.
        ValueError: a path that leaves the folder `images`, or the lists disagree: an image without label, split or box,
            an entry for an image that is not listed, a class that is not in `classes.txt`, or an image in the folder of
            another class than its label; the message names file and line.
    """
    names = read_classes(root)
    images = read_list(root / "images.txt", _text, "an image number and a path")
    labels = read_list(root / "image_class_labels.txt", _whole, "an image number and a class number")
    training = read_list(root / "train_test_split.txt", _flag, "an image number and 0 (test) or 1 (training)")
    boxes = read_list(
        root / "bounding_boxes.txt", _box, "an image number and x, y, width, height in pixels with an area"
    )
    others: tuple[NumberedList[Any], ...] = (labels, training, boxes)
    for other in others:
        _check_same_images(images, other)
    for number, name in images.values.items():
        path_inside(root / "images", name, images.where(number))
        _check_folder(number, images, labels, names)
    return [
        BirdImage(path, labels.values[n], training.values[n], boxes.values[n], boxes.where(n))
        for n, path in images.values.items()
    ]


def _check_same_images(images: NumberedList[str], other: NumberedList[Any]) -> None:
    if missing := [number for number in images.values if number not in other.values]:
        raise InputError(
            f"{images.where(missing[0])}: image {missing[0]} ({images.values[missing[0]]}) has no line in "
            f"{other.file} ({len(missing)} such images)."
        )
    if foreign := [number for number in other.values if number not in images.values]:
        raise InputError(
            f"{other.where(foreign[0])}: image {foreign[0]} is not listed in {images.file} ({len(foreign)} such lines)."
        )


def _check_folder(number: int, images: NumberedList[str], labels: NumberedList[int], names: dict[int, str]) -> None:
    species = labels.values[number]
    if species not in names:
        raise InputError(f"{labels.where(number)}: class {species} is not listed in {labels.file.parent}/classes.txt.")
    if Path(images.values[number]).parts[0] != names[species]:
        raise InputError(
            f"{images.where(number)}: {images.values[number]} is not in the folder of class {species}, "
            f"'{names[species]}', which {labels.where(number)} gives it."
        )


Array = np.ndarray[Any, Any]

CROP_AND_FLIP = Augmentation(
    vertical_flip=0.0,
    rotation=0.0,
    crop_scale=(0.08, 1.0),
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    erasing=0.0,
)


@dataclass(frozen=True)
class BoxRecord(Record):
    """An image file with the box of what it shows.

    Attributes:
        box: x and y of the upper left corner, width, height, in pixels of the file.
        where: file and line that the box comes from.
    """

    box: Box = (0.0, 0.0, 0.0, 0.0)
    where: str = ""


class BoxSource(Source):
    """Images whose shorter side is resized to `short_side`, and masks that are True inside the box.

    A pixel is inside where its centre is, after the box has been scaled like the image.
    """

    has_masks = has_boxes = True

    def __init__(self, records: Sequence[BoxRecord], short_side: int) -> None:
        self.records, self.short_side = records, short_side
        self.names = [r.name for r in records]
        self.labels = np.array([r.label for r in records], dtype=np.int64)

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """Contents of all files, read when asked, boxes and the setting."""
        return ["boxes", self.short_side, *((content_hash(r.path), r.box) for r in self.records)]

    def load(self, index: int) -> tuple[Array, Array]:
        """See `Source.load`.

        Raises:
            BadImageError: the file cannot be decoded.
            ValueError: the box lies outside of the image; the message names its file and line.
        """
        record = self.records[index]
        image = read_image(record.path)
        height, width = image.shape[:2]
        x, y, box_width, box_height = record.box
        if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
            raise InputError(
                f"{record.where}: box {record.box} lies outside of {record.path}, "
                f"which has {width} x {height} pixels; boxes are x, y, width, height."
            )
        resized = resize_short_side(image, self.short_side)
        columns = _pixels_between(x / width, (x + box_width) / width, resized.shape[1])
        rows = _pixels_between(y / height, (y + box_height) / height, resized.shape[0])
        return resized, rows[:, None] & columns


def _pixels_between(low: float, high: float, size: int) -> Array:
    """Which of `size` pixel centres, as shares of the side, lie in [low, high)."""
    centres: Array = (np.arange(size) + 0.5) / size
    return (centres >= low) & (centres < high)


class CUB(ImageDataModule):
    """CUB-200-2011 with its official split, or any subset of its classes.

    Training images show the whole picture (shorter side `resize`) to the random resized crop; validation and test
    images are its middle. `mask` and `boxes` are the bird's bounding box, cut at the border of what is shown, which
    may leave nothing of it. Grey pictures are repeated over three channels. Validation is held out of the official
    training images at random (seeded); the official test images are the test split.

    Args:
        root: folder with `images.txt`; None for `$LABN_DATA/cub10` (LABN_DATA defaults to ../shared/data).
        classes: numbers (1 to 200) of the classes to use, in the order of their labels; None: all that have images.
        image_size: side in pixels.
        resize: shorter side of the whole picture in pixels, at least `image_size`.
        val_fraction: share of the training images held out; 200 of 5994 in the C3-LRP paper.
        split_seed: of that choice.
        mean: per channel, of values in [0,1]; ImageNet's by default.
        std: per channel, likewise.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        seed: of the training order and the augmentation.
        balanced_sampler: class-balanced batches.
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; random resized crop and horizontal flip by default, None for none.
        on_bad_image: "stop" or "skip".
        cache_images: keep decoded images in memory.
        cache_dir: folder of the bias image.

    Raises:
        FileNotFoundError: a list or an image is missing (when the data is first needed, as for all below).
        ValueError: the lists disagree (file and line are named), an unknown or empty class, a bad image file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        classes: list[int] | None = None,
        image_size: int = 224,
        resize: int = 256,
        val_fraction: float = 200 / 5994,
        split_seed: int = 42,
        mean: list[float] | None = [0.485, 0.456, 0.406],  # noqa: B006 (read only)
        std: list[float] | None = [0.229, 0.224, 0.225],  # noqa: B006 (read only)
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = CROP_AND_FLIP,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            image_size,
            mean,
            std,
            batch_size,
            num_workers,
            seed,
            balanced_sampler,
            drop_last,
            augmentation,
            on_bad_image,
            cache_images,
            cache_dir,
        )
        if resize < image_size:
            raise InputError(f"resize is {resize}; it must be at least image_size, {image_size}.")
        if classes is not None and len(set(classes)) != len(classes):
            raise InputError(f"classes is {classes}; name each class once.")
        self.root, self.shorter, self.val_fraction, self.split_seed = root, resize, val_fraction, split_seed
        self._chosen = classes

    @cached_property
    def _birds(self) -> list[BirdImage]:
        return read_birds(data_root("cub10", self.root))

    @cached_property
    def classes(self) -> list[int]:
        """Official numbers of the classes in use, in the order of their labels.

        Raises:
            ValueError: fewer than two, or one without an image.
        """
        present = {bird.species for bird in self._birds}
        chosen = sorted(present) if self._chosen is None else self._chosen
        if absent := [number for number in chosen if number not in present]:
            raise InputError(f"classes has {absent[0]}, of which {data_root('cub10', self.root)} lists no image.")
        if len(chosen) < 2:
            raise InputError(f"classes has {len(chosen)} entries; at least 2 are needed.")
        return chosen

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names from `classes.txt`, with their numbers: `001.Black_footed_Albatross`."""
        names = read_classes(data_root("cub10", self.root))
        return [names[number] for number in self.classes]

    @property
    def positive_classes(self) -> tuple[int, ...]:  # type: ignore[override]
        """All classes: each is scored, also with `positives_only`."""
        return tuple(range(self.num_classes))

    def _build(self) -> dict[Split, Source]:
        root = data_root("cub10", self.root)
        test, notes_test = readable_records(self._records(root, training=False), self.on_bad_image, [root])
        train, notes_train = readable_records(self._records(root, training=True), self.on_bad_image, [root])
        train, notes_copies = without_copies(train, test)
        train, val, notes_groups = split_off(train, self.val_fraction, self.split_seed)
        self._notes = [*notes_test, *notes_train, *notes_copies, *notes_groups]
        parts: dict[Split, list[BoxRecord]] = {"train": train, "val": val, "test": test}
        assert self.shorter is not None
        return {split: BoxSource(records, self.shorter) for split, records in parts.items()}

    def _records(self, root: Path, training: bool) -> list[BoxRecord]:
        labels = {number: label for label, number in enumerate(self.classes)}
        return [
            BoxRecord(b.path, labels[b.species], root / "images" / b.path, box=b.box, where=b.where)
            for b in self._birds
            if b.training == training and b.species in labels
        ]
