"""Augmentation (training only) and the evaluation transform, both on uint8 images with their masks."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

from labn.io.images import centre

# Without this albumentations asks the package index for its newest version on every import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Augmentation:
    """The JSAI 2022 training augmentation, step by step; a step of strength 0 (or None) is left out.

    Order: horizontal flip, vertical flip, rotation, random resized crop, colour jitter, normalisation, random erasing.
    The image has been resized to the model's input before the first step. The mask moves along, and is emptied where
    the image is erased. A configuration that names only some of the fields keeps the data module's default for the
    others.

    Args:
        horizontal_flip: probability.
        vertical_flip: probability.
        rotation: limit in degrees, drawn from [-rotation, rotation]; corners are filled with black.
        crop_scale: area of the random resized crop as a share of the image, or None for no crop. As in torchvision a
            crop that does not fit is drawn again, ten times at most, then the whole image is taken. Shares above 1
            never fit, so the published (0.7, 1.3) yields crops of 0.7 to 1.0 (median 0.79) and the whole image in 3 %
            of cases; (0.7, 1.0) clamps it.
        crop_ratio: width / height of the crop.
        brightness: factor drawn from [1 - b, 1 + b].
        contrast: likewise.
        saturation: likewise.
        hue: shift drawn from [-hue, hue], at most 0.5.
        erasing: probability of erasing one rectangle (to the normalised value 0, the mean colour).
        erasing_scale: its area as a share of the image.
        erasing_ratio: its width / height.
    """

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    rotation: float = 5.0
    crop_scale: tuple[float, float] | None = (0.7, 1.3)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.0
    erasing: float = 0.5
    erasing_scale: tuple[float, float] = (0.02, 0.33)
    erasing_ratio: tuple[float, float] = (0.3, 3.3)


PUBLISHED = Augmentation()

FLIPS = Augmentation(rotation=0.0, crop_scale=None, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, erasing=0.0)


def _crop(size: int, scale: Sequence[float], ratio: Sequence[float]) -> Any:
    crop = A.RandomResizedCrop(size=(size, size), ratio=(ratio[0], ratio[1]), p=1.0)
    # Set afterwards, because the constructor refuses shares above 1, which the published augmentation has.
    crop.scale = (scale[0], scale[1])
    return crop


def _steps(augmentation: Augmentation, size: int) -> list[Any]:
    a = augmentation
    jitter = any((a.brightness, a.contrast, a.saturation, a.hue)) and A.ColorJitter(
        brightness=_around_one(a.brightness),
        contrast=_around_one(a.contrast),
        saturation=_around_one(a.saturation),
        hue=(-a.hue, a.hue),
        p=1.0,
    )
    steps = [
        a.horizontal_flip and A.HorizontalFlip(p=a.horizontal_flip),
        a.vertical_flip and A.VerticalFlip(p=a.vertical_flip),
        a.rotation and A.Rotate(limit=(-a.rotation, a.rotation), border_mode=cv2.BORDER_CONSTANT, p=1.0),
        a.crop_scale and _crop(size, a.crop_scale, a.crop_ratio),
        jitter,
    ]
    return [step for step in steps if step]


def _around_one(strength: float) -> tuple[float, float]:
    return max(0.0, 1.0 - strength), 1.0 + strength


class Transform:
    """uint8 image (H,W,C) and mask (H,W) to normalised float32 tensors of one size, augmented or not.

    Of an image that is larger than `size` the random resized crop sees all, and without one the middle is taken.
    All random numbers come from the `seed` of the call: the same seed gives the same result in any process.

    Args:
        size: side of the (square) images, in pixels.
        mean: per channel, of values in [0,1].
        std: per channel, likewise.
        augmentation: None (evaluation) or the training augmentation.
    """

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], augmentation: Augmentation | None = None
    ) -> None:
        self._compose, self._random = compose(size, mean, std, augmentation)
        self._size = None if augmentation and augmentation.crop_scale else size

    def __call__(
        self, image: Array, mask: Array | None = None, seed: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor | None]:
        """Transform one sample.

        Args:
            image: (H,W,C) uint8.
            mask: (H,W) bool, or None.
            seed: integers, for instance (seed, epoch, index).

        Returns:
            image (C,H,W) float32 and mask (H,W) bool (None where None came in).
        """
        if self._random:
            reseed(self._compose, seed)
        if self._size is not None:
            image, mask = centre(image, self._size), None if mask is None else centre(mask, self._size)
        targets = {"image": image} if mask is None else {"image": image, "mask": mask.astype(np.uint8)}
        out = self._compose(**targets)
        return to_tensor(out["image"]), None if mask is None else torch.from_numpy(
            np.ascontiguousarray(out["mask"]) > 0
        )


def compose(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None = None,
    bbox_params: Any | None = None,
) -> tuple[Any, bool]:
    """All steps as one callable, normalisation included, and whether any of them is random.

    `bbox_params` (of albumentations) makes the steps move boxes along.
    """
    steps = _steps(augmentation, size) if augmentation else []
    erase = augmentation and augmentation.erasing
    random_steps = bool(steps or erase)
    steps.append(A.Normalize(mean=tuple(mean), std=tuple(std), max_pixel_value=255.0))
    if augmentation and erase:
        scale, ratio = tuple(augmentation.erasing_scale), tuple(augmentation.erasing_ratio)
        steps.append(A.Erasing(scale=scale, ratio=ratio, fill=0, fill_mask=0, p=erase))
    return A.Compose(steps, bbox_params=bbox_params), random_steps


def reseed(compose: Any, seed: Sequence[int]) -> None:
    """Let all steps draw from one generator that follows from `seed` alone."""
    # `Compose.set_random_seed` would give every step its OWN generator with the SAME seed, so that for instance
    # both flips always happen together; one generator shared by all steps keeps them independent.
    numpy_seed, python_seed = np.random.SeedSequence(list(seed)).generate_state(2, np.uint64)
    compose.set_random_state(np.random.default_rng(numpy_seed), random.Random(int(python_seed)))


def to_tensor(pixels: Array) -> Tensor:
    """(H,W) or (H,W,C) floats as a contiguous (C,H,W) float32 tensor."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))
