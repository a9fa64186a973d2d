"""Images with object boxes: a transform that moves the boxes along, samples, and batches of unequal box counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.io.sources import ImageDataset, Source
from datamodules.io.transforms import Augmentation, compose, reseed, to_tensor

Array = np.ndarray[Any, Any]

OBJECT_FIELDS = ("boxes", "labels", "difficult")


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image.

    Attributes:
        boxes: (n, 4) float x1, y1, x2, y2 as fractions of the image's width and height, in [0, 1].
        labels: (n,) int64 object classes, 0 is the first (no background).
        difficult: (n,) bool, objects that evaluation does not count.
    """

    boxes: Array
    labels: Array
    difficult: Array

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, chosen: Array) -> Objects:
        """The objects that a boolean mask or an array of positions chooses."""
        return Objects(self.boxes[chosen], self.labels[chosen], self.difficult[chosen])


class BoxTransform:
    """uint8 image (S,S,C) with objects to a normalised tensor with the objects that are still visible.

    Args:
        size: side of the images, in pixels.
        mean: per channel, of values in [0,1].
        std: per channel, likewise.
        augmentation: None (evaluation) or the training augmentation.
        min_visibility: objects of which a crop leaves less than this share of the area are dropped.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        min_visibility: float = 0.3,
    ) -> None:
        boxes = A.BboxParams(format="albumentations", label_fields=["numbers"], min_visibility=min_visibility)
        self._compose, self._random = compose(size, mean, std, augmentation, boxes if augmentation else None)

    def __call__(self, image: Array, objects: Objects, seed: Sequence[int] = (0,)) -> tuple[Tensor, Objects]:
        """Transform one sample; the random numbers come from `seed` alone."""
        if not self._random:
            return to_tensor(self._compose(image=image)["image"]), objects
        reseed(self._compose, seed)
        out = self._compose(image=image, bboxes=objects.boxes, numbers=np.arange(len(objects)))
        kept = objects.select(np.asarray(out["numbers"], dtype=np.int64))
        moved = np.asarray(out["bboxes"], dtype=np.float64).reshape(-1, 4)
        return to_tensor(out["image"]), Objects(moved, kept.labels, kept.difficult)


class BoxDataset(ImageDataset):
    """Samples with `boxes` (n,4) float32 in pixels, `labels` (n,) int64 and `difficult` (n,) bool beside the others.

    Args:
        source: pixels and names.
        objects: one entry per sample.
        transform: moves the boxes along.
        seed: of the augmentation.
        drop_difficult: leave difficult objects out (training).
    """

    def __init__(
        self,
        source: Source,
        objects: Sequence[Objects],
        transform: BoxTransform,
        seed: int = 0,
        drop_difficult: bool = False,
    ) -> None:
        self.source, self.seed = source, seed
        self.objects = [o.select(~o.difficult) if drop_difficult else o for o in objects]
        self.box_transform = transform

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (int(key), 0)
        image, _ = self.source.load(index)
        tensor, objects = self.box_transform(image, self.objects[index], seed=(self.seed, epoch, index))
        height, width = tensor.shape[-2:]
        return {
            "image": tensor,
            "label": int(self.source.labels[index]),
            "index": index,
            "boxes": torch.from_numpy(objects.boxes * [width, height, width, height]).float().reshape(-1, 4),
            "labels": torch.from_numpy(objects.labels),
            "difficult": torch.from_numpy(objects.difficult),
        }


def collate_boxes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors stacked, the box fields as lists with one tensor per image."""
    stacked = default_collate([{k: v for k, v in sample.items() if k not in OBJECT_FIELDS} for sample in samples])
    return {**stacked, **{name: [sample[name] for sample in samples] for name in OBJECT_FIELDS}}
