"""CUB-200-2011 (Wah et al., Caltech technical report 2011): 200 kinds of birds with boxes, in its own layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ImageDataModule, OnBadImage, Split
from datamodules.cub_lists import Bird, Box, read_birds, read_classes
from datamodules.files import contents, data_root, read_image, resize_short_side
from datamodules.sources import Record, Source
from datamodules.splits import readable, split_off, without_copies
from datamodules.transforms import Augmentation

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
        return ["boxes", self.short_side, *((contents(r.path), r.box) for r in self.records)]

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
            raise ValueError(
                f"{record.where}: box {record.box} lies outside of {record.path}, "
                f"which has {width} x {height} pixels; boxes are x, y, width, height."
            )
        resized = resize_short_side(image, self.short_side)
        columns = _inside(x / width, (x + box_width) / width, resized.shape[1])
        rows = _inside(y / height, (y + box_height) / height, resized.shape[0])
        return resized, rows[:, None] & columns


def _inside(low: float, high: float, size: int) -> Array:
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
            raise ValueError(f"resize is {resize}; it must be at least image_size, {image_size}.")
        if classes is not None and len(set(classes)) != len(classes):
            raise ValueError(f"classes is {classes}; name each class once.")
        self.root, self.shorter, self.val_fraction, self.split_seed = root, resize, val_fraction, split_seed
        self._chosen = classes

    @cached_property
    def _birds(self) -> list[Bird]:
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
            raise ValueError(f"classes has {absent[0]}, of which {data_root('cub10', self.root)} lists no image.")
        if len(chosen) < 2:
            raise ValueError(f"classes has {len(chosen)} entries; at least 2 are needed.")
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
        test, notes_test = readable(self._records(root, training=False), self.on_bad_image, [root])
        train, notes_train = readable(self._records(root, training=True), self.on_bad_image, [root])
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
