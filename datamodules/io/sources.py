"""Sources of a split's samples: names and labels at once, pixels on demand."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.io.image_checks import image_error
from datamodules.io.layered_scene import LayeredScene
from datamodules.io.transforms import Transform
from labn.errors import InputError
from labn.io.images import (
    Box,
    content_hash,
    crop,
    digest,
    read_image,
    read_mask,
    squash_mask,
    to_square,
)

Array = np.ndarray[Any, Any]


class Source(ABC):
    """One split of a data set. Names and labels are available without decoding an image.

    Attributes:
        names: names of the samples, unique within the split.
        labels: (N,) int64 classes.
        has_masks: whether `load` returns masks.
        has_boxes: whether the regions are boxes; samples then have `boxes` too.
        has_scenes: whether `scene` gives the objects that an image was drawn from.
        least_label: the smallest label; -1 where a sample may belong to no class.
        groups: (N,) int64 group of every sample (a day, a patient); None where samples are independent.
        identity: all values that the data hash depends on, beside names, labels and the data module's settings.
    """

    names: Sequence[str]
    labels: Array
    has_masks: bool
    has_boxes: bool = False
    has_scenes: bool = False
    least_label: int = 0
    groups: Array | None = None
    identity: Sequence[object]

    @abstractmethod
    def load(self, index: int) -> tuple[Array, Array | None]:
        """Load image (H,W,C) uint8 and mask (H,W) bool; the mask is None where `has_masks` is False.

        A sample without a region has an all-False mask. Images that are larger than the input are cut to size by the
        transform.
        """

    def scene(self, index: int) -> LayeredScene:
        """The objects that image `index` was drawn from; `scene(index).draw()` is the image of `load`.

        Raises:
            InputError: `has_scenes` is False.
        """
        raise InputError(f"{type(self).__name__} holds images that were not drawn from objects; it has no scenes.")

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hash (16 hex digits) of `identity`, names and labels."""
        return digest([*self.identity, *self.names, *self.labels.tolist()])


def check_source(split: str, source: Source, classes: int) -> Source:
    """A source with as many names as labels, and labels of the data module's classes; other sources raise.

    Args:
        split: name of the split, for messages.
        source: the source.
        classes: number of classes.

    Raises:
        InputError: a label is not an index of a class, or names, labels or groups differ in their number.
    """
    labels, groups = source.labels, source.groups
    if len(source.names) != len(labels) or (groups is not None and len(groups) != len(labels)):
        counts = f"{len(source.names)} names and {len(labels)} labels"
        raise InputError(
            f"Split {split} has {counts}; every sample needs one of each, and one group where there are any."
        )
    outside = np.flatnonzero((labels < source.least_label) | (labels >= classes))
    if len(outside):
        name, label = source.names[int(outside[0])], int(labels[outside[0]])
        raise InputError(
            f"Split {split}: {name} has the label {label}, which is none of the {classes} classes; labels count from 0 "
            f"to {classes - 1}."
        )
    return source


@dataclass(frozen=True)
class Record:
    """One image file of a data set.

    Attributes:
        name: name of the sample in results.
        label: class.
        path: path of the image file.
        masks: mask files whose union is the ground-truth region.
    """

    name: str
    label: int
    path: Path
    masks: tuple[Path, ...] = ()


def file_error(record: Record) -> str | None:
    """A sentence about the first file of `record` that cannot be read; None where all can be read."""
    for path in (record.path, *record.masks):
        if reason := image_error(path):
            return f"Image {path} {reason}."
    return None


class FileSource(Source):
    """Image files, cropped and brought to (size,size).

    Args:
        records: image files with names, labels and masks.
        size: side in pixels.
        crop: (left, top, right, bottom) as fractions of each image's size; None uses the whole image.
        channels: 3 (RGB) or 1 (grey).
        has_masks: whether `load` returns masks; a record without mask files has an all-False mask.
        shorter: None squashes the image; else its shorter side is resized to this many pixels and the central square is
            taken. Masks are always squashed, so that `shorter` is for data without masks.
    """

    def __init__(
        self,
        records: Sequence[Record],
        size: int,
        crop: Box | None = None,
        channels: int = 3,
        has_masks: bool = False,
        shorter: int | None = None,
    ) -> None:
        self.records, self.size, self.crop, self.channels, self.shorter = records, size, crop, channels, shorter
        self.names = [r.name for r in records]
        self.labels = np.array([r.label for r in records], dtype=np.int64)
        self.has_masks = has_masks

    @property
    def identity(self) -> list[object]:  # type: ignore[override]
        """Settings and content hashes of all files, computed on access."""
        files = [[content_hash(p) for p in (r.path, *r.masks)] for r in self.records]
        # Only listed where it is set, which keeps the data hashes of earlier versions.
        shorter = [] if self.shorter is None else [self.shorter]
        return ["files", self.size, self.crop, self.channels, self.has_masks, *shorter, *files]

    def load(self, index: int) -> tuple[Array, Array | None]:
        """See `Source.load`.

        Raises:
            BadImageError: a file cannot be decoded; the message names it.
        """
        record = self.records[index]
        image = to_square(crop(read_image(record.path, self.channels), self.crop), self.size, self.shorter)
        if not self.has_masks:
            return image, None
        mask = np.zeros((self.size, self.size), dtype=bool)
        for path in record.masks:
            mask |= squash_mask(crop(read_mask(path), self.crop), self.size)
        return image, mask


class ArraySource(Source):
    """A split in memory: N images (H,W,C) uint8, N masks (H,W) bool or None, groups (N,) int64 or None."""

    def __init__(
        self,
        names: Sequence[str],
        labels: Array,
        images: Sequence[Array],
        masks: Sequence[Array] | None,
        identity: Sequence[object],
        has_boxes: bool = False,
        groups: Array | None = None,
    ) -> None:
        self.names, self.labels, self.images, self.masks = names, labels, images, masks
        self.identity, self.groups = identity, groups
        self.has_masks, self.has_boxes = masks is not None, has_boxes

    @classmethod
    def preloaded(cls, source: Source) -> ArraySource:
        """Decode all samples of `source` with a few threads; the decoder releases the interpreter lock."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            loaded = list(pool.map(source.load, range(len(source))))
        images = [image for image, _ in loaded]
        masks = [mask for _, mask in loaded if mask is not None] if source.has_masks else None
        return cls(source.names, source.labels, images, masks, source.identity, source.has_boxes, source.groups)

    def load(self, index: int) -> tuple[Array, Array | None]:
        """See `Source.load`."""
        return self.images[index], None if self.masks is None else self.masks[index]


class ImageDataset(Dataset[dict[str, Any]]):
    """Single samples as dicts with the fields of a batch, see `ImageDataModule`.

    A sample is indexed by an int (epoch 0) or by `(index, epoch)`. The random numbers of the augmentation depend on
    (seed, epoch, index) alone, and not on workers, ranks or batch size.

    Args:
        source: names, labels and pixels of the split.
        transform: transform of image and mask.
        seed: seed of the augmentation.
    """

    def __init__(self, source: Source, transform: Transform, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (int(key), 0)
        image, mask = self.source.load(index)
        tensor, moved = self.transform(image, mask, seed=(self.seed, epoch, index))
        sample = {"image": tensor, "label": int(self.source.labels[index]), "index": index}
        if self.source.groups is not None:
            sample["group"] = int(self.source.groups[index])
        if moved is None:
            return sample
        sample["mask"] = moved
        return {**sample, "boxes": bounding_box(moved)} if self.source.has_boxes else sample


def bounding_box(mask: Tensor) -> Tensor:
    """The smallest box (1,4) float32, x1, y1, x2, y2 in pixels, around a mask (H,W); zeros for an empty mask.

    Example:
        >>> mask = torch.zeros(4, 5, dtype=torch.bool)
        >>> mask[1:3, 2] = True
        >>> bounding_box(mask).tolist()
        [[2.0, 1.0, 3.0, 3.0]]
    """
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return torch.zeros(1, 4)
    corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return torch.cat(corners)[None].float()
