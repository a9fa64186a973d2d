"""CUB-200-2011 (Wah et al., Caltech technical report 2011): 200 bird species with bounding boxes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from datamodules.base import ImageDataModule, data_root
from datamodules.io.sources import Record, Source
from datamodules.io.splits import Split, readable_records, split_off, without_copies
from datamodules.io.transforms import Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import content_hash, read_image, resize_short_side
from labn.io.readers import path_inside, read_text

Value = TypeVar("Value")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BirdImage:
    """One image of the data set's lists.

    Attributes:
        path: path of the image file, relative to the folder `images`.
        species: class number, from 1 as in `classes.txt`.
        training: whether the official split has the image in its training set.
        box: x and y of the upper left corner, width and height, in pixels of the file, with decimals.
        where: file and line of the box, for errors that can only be found once the image is read.
    """

    path: str
    species: int
    training: bool
    box: Box
    where: str


@dataclass(frozen=True)
class NumberedList(Generic[Value]):
    """The content of one list file.

    Attributes:
        file: path of the list.
        values: number of the image (or class) -> its value.
        lines: number of the image (or class) -> its line in the file, from 1.
    """

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
    """Read a list file with a number and a value on every line; empty lines are skipped.

    Args:
        file: path of the list.
        parse: words after the number -> value; a ValueError or KeyError means that the line is malformed.
        wanted: description of a well-formed line, for the error message.

    Raises:
        MissingFileError: the file does not exist.
        InputError: a line is malformed, or a number has two lines; the message names file and line.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; `root` must hold CUB-200-2011 in its own layout.")
    content: NumberedList[Value] = NumberedList(file, {}, {})
    for line, text in enumerate(read_text(file).splitlines(), start=1):
        if not (words := text.split()):
            continue
        try:
            number, value = int(words[0]), parse(words[1:])
        except (ValueError, KeyError):
            raise InputError(f"{file}, line {line}: '{text.strip()}' must be {wanted}.") from None
        if number in content.values:
            raise InputError(
                f"{file}, line {line}: number {number} is already in line {content.lines[number]}; "
                "every number needs exactly one line."
            )
        content.values[number], content.lines[number] = value, line
    return content


def read_classes(root: Path) -> dict[int, str]:
    """Class number -> class name, such as `001.Black_footed_Albatross`, from `classes.txt`."""
    return read_list(root / "classes.txt", _text, "a class number and its name").values


def read_birds(root: Path, strict_links: bool = True) -> list[BirdImage]:
    """Read all images of the lists, in the order of `images.txt`; `strict_links` refuses links out of `images`.

    Raises:
        MissingFileError: a list is missing.
        InputError: a path leaves the folder `images`, or the lists disagree: an image has no label, split or box, an
            entry belongs to an unlisted image, a class is not in `classes.txt`, or an image lies in the folder of
            another class; the message names file and line.
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
        path_inside(root / "images", name, images.where(number), strict_links)
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
    """An image file with the bounding box of its object.

    Attributes:
        box: x and y of the upper left corner, width and height, in pixels of the file.
        where: file and line of the box, for error messages.
    """

    box: Box = (0.0, 0.0, 0.0, 0.0)
    where: str = ""


class BoxSource(Source):
    """Images whose shorter side is resized to `short_side`, with masks that are True inside the box.

    The box is scaled with the image; a pixel lies inside the box if its centre does.
    """

    has_masks = has_boxes = True

    def __init__(self, records: Sequence[BoxRecord], short_side: int) -> None:
        self.records, self.short_side = records, short_side
        self.names = [r.name for r in records]
        self.labels = np.array([r.label for r in records], dtype=np.int64)

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """Content hashes of all files (computed on access), boxes, and `short_side`."""
        return ["boxes", self.short_side, *((content_hash(r.path), r.box) for r in self.records)]

    def load(self, index: int) -> tuple[Array, Array]:
        """See `Source.load`.

        Raises:
            BadImageError: the file cannot be decoded.
            InputError: the box lies outside the image; the message names file and line of the box.
        """
        record = self.records[index]
        image = read_image(record.path)
        height, width = image.shape[:2]
        x, y, box_width, box_height = record.box
        if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
            raise InputError(
                f"{record.where}: box {record.box} lies outside {record.path}, "
                f"which has {width} x {height} pixels; boxes are x, y, width, height."
            )
        resized = resize_short_side(image, self.short_side)
        columns = _pixels_between(x / width, (x + box_width) / width, resized.shape[1])
        rows = _pixels_between(y / height, (y + box_height) / height, resized.shape[0])
        return resized, rows[:, None] & columns


def _pixels_between(low: float, high: float, size: int) -> Array:
    """Boolean (size,): True for pixels whose centre, as a fraction of the side, lies in [low, high)."""
    centres: Array = (np.arange(size) + 0.5) / size
    return (centres >= low) & (centres < high)


class CUB(ImageDataModule):
    """CUB-200-2011 with its official split, or any subset of its classes.

    Every picture is resized so that its shorter side is `resize`. Training draws random resized crops from the whole
    picture; validation and test take the central square. `mask` and `boxes` are the bird's bounding box, clipped to
    the shown square, and empty where the box lies outside. Grey pictures are repeated over three channels. The
    validation split is drawn from the official training images at random (seeded); the test split is the official one.

    Args:
        root: folder with `images.txt`; None takes `$LABN_DATA/cub10`.
        classes: numbers (1 to 200) of the classes to use, in the order of their labels; None uses every class that has
            images.
        image_size: side of the square in pixels.
        resize: length of the picture's shorter side in pixels, at least `image_size`.
        val_fraction: share of the training images for validation, where `val_count` is None.
        val_count: number of training images for validation; None takes `val_fraction`. The C3-LRP slides hold out 200
            of 5994, which leaves 5794 for training.
        split_seed: seed of the validation split.
        mean: mean of each channel for values in [0,1]; ImageNet's by default.
        std: standard deviation of each channel for values in [0,1]; ImageNet's by default.
        augmentation: augmentation of the training split; by default random resized crop and horizontal flip.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: a list or an image is missing (raised when the data is first used, as the errors below).
        InputError: the lists disagree (the message names file and line), a class is unknown or has no image, or an
            image file is damaged.

    Example:
        >>> import tempfile, cv2
        >>> lines = {"classes": "1 001.Gull\\n2 002.Tern", "images": "1 001.Gull/a.jpg\\n2 002.Tern/b.jpg"}
        >>> lines |= {"image_class_labels": "1 1\\n2 2", "train_test_split": "1 1\\n2 0"}
        >>> lines |= {"bounding_boxes": "1 2 3 8 9\\n2 10 6 8 8"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, text in lines.items():
        ...         _ = (Path(folder) / f"{name}.txt").write_text(text)
        ...     for name in ("001.Gull/a.jpg", "002.Tern/b.jpg"):
        ...         (Path(folder) / "images" / name).parent.mkdir(parents=True)
        ...         _ = cv2.imwrite(f"{folder}/images/{name}", np.zeros((20, 30, 3), np.uint8))
        ...     data = CUB(folder, image_size=8, resize=10)
        ...     names, sample = data.class_names, data.dataset("test")[0]
        >>> names, sample["label"], sample["boxes"].tolist()
        (['001.Gull', '002.Tern'], 1, [[2.0, 2.0, 6.0, 6.0]])
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        classes: list[int] | None = None,
        image_size: int = 224,
        resize: int = 256,
        val_fraction: float = 200 / 5994,
        val_count: int | None = None,
        split_seed: int = 42,
        mean: list[float] | None = [0.485, 0.456, 0.406],  # noqa: B006 (read only)
        std: list[float] | None = [0.229, 0.224, 0.225],  # noqa: B006 (read only)
        augmentation: Augmentation | None = CROP_AND_FLIP,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, mean, std, augmentation=augmentation, **kwargs)
        if resize < image_size:
            raise InputError(f"resize is {resize}; it must be at least image_size, {image_size}.")
        if classes is not None and len(set(classes)) != len(classes):
            raise InputError(f"classes is {classes}; give each class once.")
        self.root, self.shorter, self.val_fraction, self.split_seed = root, resize, val_fraction, split_seed
        self.val_count, self._chosen = val_count, classes

    @cached_property
    def _birds(self) -> list[BirdImage]:
        return read_birds(data_root("cub10", self.root), self.strict_links)

    @cached_property
    def classes(self) -> list[int]:
        """Official numbers of the used classes, in the order of their labels.

        Raises:
            InputError: there are fewer than two classes, or a class has no image.
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
        """Names from `classes.txt`, which begin with the class number: `001.Black_footed_Albatross`."""
        names = read_classes(data_root("cub10", self.root))
        return [names[number] for number in self.classes]

    @property
    def positive_classes(self) -> tuple[int, ...]:  # type: ignore[override]
        """All labels: no class of birds is negative, so `positives_only` leaves none out."""
        return tuple(range(self.num_classes))

    def _build(self) -> dict[Split, Source]:
        root = data_root("cub10", self.root)
        test, notes_test = readable_records(
            self._records(root, training=False), self.on_bad_image, [root], strict_links=self.strict_links
        )
        train, notes_train = readable_records(
            self._records(root, training=True), self.on_bad_image, [root], strict_links=self.strict_links
        )
        train, notes_copies = without_copies(train, test)
        train, val, notes_groups = split_off(train, self._validation_share(len(train)), self.split_seed)
        self._notes = [*notes_test, *notes_train, *notes_copies, *notes_groups]
        splits: dict[Split, list[BoxRecord]] = {"train": train, "val": val, "test": test}
        assert self.shorter is not None
        return {split: BoxSource(records, self.shorter) for split, records in splits.items()}

    def _validation_share(self, images: int) -> float:
        """Share of the training images that gives `val_count` images, or `val_fraction`."""
        if self.val_count is None:
            return self.val_fraction
        if not 0 < self.val_count < images:
            raise InputError(f"val_count is {self.val_count}; it must be from 1 to {images - 1}, of {images} images.")
        return self.val_count / images

    def _records(self, root: Path, training: bool) -> list[BoxRecord]:
        labels = {number: label for label, number in enumerate(self.classes)}
        return [
            BoxRecord(b.path, labels[b.species], root / "images" / b.path, box=b.box, where=b.where)
            for b in self._birds
            if b.training == training and b.species in labels
        ]
