"""Images with object boxes: a transform of image and boxes, a dataset, and batches with unequal numbers of boxes."""

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
        labels: (n,) int64 object classes, from 0; there is no background class.
        difficult: (n,) bool, objects that evaluation counts neither as hits nor as misses.
    """

    boxes: Array
    labels: Array
    difficult: Array

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, chosen: Array) -> Objects:
        """The objects at the True entries of a boolean mask, or at an array of positions."""
        return Objects(self.boxes[chosen], self.labels[chosen], self.difficult[chosen])


class BoxTransform:
    """Transforms an image (S,S,C) uint8 and its objects to a normalised tensor and the objects that remain visible.

    Args:
        size: side of the images, in pixels.
        mean: mean of each channel for values in [0,1].
        std: standard deviation of each channel for values in [0,1].
        augmentation: the training augmentation; None for evaluation.
        min_visibility: objects are dropped where a crop leaves less than this share of their area.
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
        """Transform one sample; the random numbers depend on `seed` alone."""
        if not self._random:
            return to_tensor(self._compose(image=image)["image"]), objects
        reseed(self._compose, seed)
        # The objects' numbers pass through albumentations as labels and tell which objects it has dropped.
        out = self._compose(image=image, bboxes=objects.boxes, numbers=np.arange(len(objects)))
        visible = objects.select(np.asarray(out["numbers"], dtype=np.int64))
        moved = np.asarray(out["bboxes"], dtype=np.float64).reshape(-1, 4)
        return to_tensor(out["image"]), Objects(moved, visible.labels, visible.difficult)


class BoxDataset(ImageDataset):
    """Samples with `image`, `label`, `index`, `boxes` (n,4) float32 in pixels, `labels` (n,) int64, `difficult` (n,).

    Args:
        source: pixels, names and labels.
        objects: the objects of each sample.
        transform: transform of image and objects.
        seed: seed of the augmentation.
        drop_difficult: leave difficult objects out, as in training.
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
    """Make a batch: tensors are stacked; `boxes`, `labels` and `difficult` stay lists with one tensor per image.

    Example:
        >>> sample = {"image": torch.zeros(3, 4, 4), "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
        >>> one, two = {**sample, "boxes": torch.zeros(1, 4)}, {**sample, "boxes": torch.zeros(2, 4)}
        >>> batch = collate_boxes([one, two])
        >>> batch["image"].shape, [len(boxes) for boxes in batch["boxes"]]
        (torch.Size([2, 3, 4, 4]), [1, 2])
    """
    stacked = default_collate([{k: v for k, v in sample.items() if k not in OBJECT_FIELDS} for sample in samples])
    return {**stacked, **{name: [sample[name] for sample in samples] for name in OBJECT_FIELDS}}
