"""Where a split's samples come from: names and labels at once, pixels on demand."""

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
from datamodules.io.transforms import Transform
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
    """One split: `names`, `labels` (no image is decoded for them) and `load`.

    Attributes:
        names: one per sample, unique within the split.
        labels: (N,) int64.
        has_masks: whether `load` returns masks.
        has_boxes: whether the region of a mask is a box, so that samples carry it as `boxes` too.
        groups: (N,) int64, what samples that are not independent have in common (a day, a patient); None: they are.
        identity: what the data hash is made from beside names, labels and the data module's own settings.
    """

    names: Sequence[str]
    labels: Array
    has_masks: bool
    has_boxes: bool = False
    groups: Array | None = None
    identity: Sequence[object]

    @abstractmethod
    def load(self, index: int) -> tuple[Array, Array | None]:
        """Image (H,W,C) uint8 and, where the data has masks, mask (H,W) bool (all False: none for this sample).

        All images of a source have H = W, or those that a transform cuts to one size.
        """

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hash of names, labels and `identity`."""
        return digest([*self.identity, *self.names, *self.labels.tolist()])


@dataclass(frozen=True)
class Record:
    """One image file: its name in results, class, and the mask files whose union is its ground-truth region."""

    name: str
    label: int
    path: Path
    masks: tuple[Path, ...] = ()


def file_error(record: Record) -> str | None:
    """A sentence naming the first file of `record` that cannot be read, or None."""
    for path in (record.path, *record.masks):
        if reason := image_error(path):
            return f"Image {path} {reason}."
    return None


class FileSource(Source):
    """Images in files, cropped, then squashed to (size,size), or cut out of their centre with their aspect kept.

    Args:
        records: the samples.
        size: side in pixels.
        crop: (left, top, right, bottom) as fractions of each image's size, or None.
        channels: 3 (RGB) or 1 (grey).
        has_masks: whether samples carry a `mask`, all False for records without mask files.
        shorter: None squashes; else the shorter side is resized to it and the middle taken (without masks).
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
        """Contents of all files, read when asked, and the settings."""
        files = [[content_hash(p) for p in (r.path, *r.masks)] for r in self.records]
        kept_aspect = [] if self.shorter is None else [self.shorter]
        return ["files", self.size, self.crop, self.channels, self.has_masks, *kept_aspect, *files]

    def load(self, index: int) -> tuple[Array, Array | None]:
        """See `Source.load`. Raises `BadImageError` naming a file that cannot be decoded."""
        record = self.records[index]
        image = to_square(crop(read_image(record.path, self.channels), self.crop), self.size, self.shorter)
        if not self.has_masks:
            return image, None
        mask = np.zeros((self.size, self.size), dtype=bool)
        for path in record.masks:
            mask |= squash_mask(crop(read_mask(path), self.crop), self.size)
        return image, mask


class ArraySource(Source):
    """A split held in memory: N images (H,W,C) uint8, N masks (H,W) bool or None, groups (N,) int64 or None."""

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
        """Decode `source` once, with a few threads (the decoder releases the interpreter lock)."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            loaded = list(pool.map(source.load, range(len(source))))
        images = [image for image, _ in loaded]
        masks = [mask for _, mask in loaded if mask is not None] if source.has_masks else None
        return cls(source.names, source.labels, images, masks, source.identity, source.has_boxes, source.groups)

    def load(self, index: int) -> tuple[Array, Array | None]:
        """See `Source.load`."""
        return self.images[index], None if self.masks is None else self.masks[index]


class ImageDataset(Dataset[dict[str, Any]]):
    """Samples as the dict of the batch contract, one at a time.

    Indexed by an int (epoch 0) or by `(index, epoch)`; the augmentation's randomness is a function of
    (seed, epoch, index) alone, so workers, ranks and batch size do not change it.
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
    """The smallest box (1,4) float32, x1, y1, x2, y2 in pixels, around a mask (H,W); four zeros where it is empty."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return torch.zeros(1, 4)
    corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return torch.cat(corners)[None].float()
