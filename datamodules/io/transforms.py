"""The training augmentation and the evaluation transform of uint8 images and their masks."""

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

# By default, albumentations asks the package index for its newest version on every import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Augmentation:
    """The training augmentation of JSAI 2022; a step with strength 0 (or None) is left out.

    The steps are, in this order: horizontal flip, vertical flip, rotation, random resized crop, colour jitter,
    normalisation, random erasing. Images are resized to the model's input before the first step. Masks are flipped,
    rotated and cropped with their images, and set to False where the image is erased. In a configuration, fields that
    are not named keep the data module's defaults.

    Args:
        horizontal_flip: probability.
        vertical_flip: probability.
        rotation: limit in degrees; the angle is drawn from [-rotation, rotation], and corners are filled with black.
        crop_scale: range of the area of the random resized crop, as a share of the image; None for no crop. As in
            torchvision, a crop that does not fit is drawn again, at most ten times, before the whole image is taken.
            Shares above 1 never fit, so the published (0.7, 1.3) gives crops of 0.7 to 1.0 (median 0.79), and the whole
            image in 3 % of all cases.
        crop_ratio: range of width / height of the crop.
        brightness: strength b; the factor is drawn from [1 - b, 1 + b].
        contrast: strength, as for brightness.
        saturation: strength, as for brightness.
        hue: limit of the shift, at most 0.5; the shift is drawn from [-hue, hue].
        erasing: probability of erasing one rectangle, which is set to the mean colour (0 after normalisation).
        erasing_scale: range of the rectangle's area, as a share of the image.
        erasing_ratio: range of the rectangle's width / height.

    Example:
        >>> flips = Augmentation(rotation=0, crop_scale=None, brightness=0, contrast=0, saturation=0, erasing=0)
        >>> transform = Transform(2, mean=[0.0], std=[1.0], augmentation=flips)
        >>> image = np.array([[[255], [0]], [[0], [0]]], dtype=np.uint8)
        >>> tensor, _ = transform(image, seed=(1, 2, 3))
        >>> tensor.shape, tensor.sum().item()
        (torch.Size([1, 2, 2]), 1.0)
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
    # Set after construction, because the constructor raises for shares above 1, as in the published augmentation.
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
    """Transforms image (H,W,C) uint8 and mask (H,W) bool to a normalised float32 tensor and a mask of one size.

    The random resized crop of the augmentation sees the whole image; without it, the central (size,size) square of a
    larger image is taken. All random numbers depend on the `seed` of the call: equal seeds give equal results in every
    process.

    Args:
        size: side of the square output in pixels.
        mean: mean of each channel for values in [0,1].
        std: standard deviation of each channel for values in [0,1].
        augmentation: the training augmentation; None for evaluation.
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
            image (C,size,size) float32 and mask (size,size) bool; None for a mask of None.
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
    """Compose all steps, including normalisation.

    Args:
        size: side of the square output in pixels.
        mean: mean of each channel for values in [0,1].
        std: standard deviation of each channel for values in [0,1].
        augmentation: the training augmentation; None for evaluation.
        bbox_params: albumentations' `BboxParams`, where boxes are transformed too.

    Returns:
        The composed transform, and whether any of its steps is random.
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
    """Let all steps draw from one generator that depends on `seed` alone."""
    # `Compose.set_random_seed` would give every step its own generator with the same seed, so that, for instance, both
    # flips would always happen together; one generator shared by all steps keeps the steps independent.
    numpy_seed, python_seed = np.random.SeedSequence(list(seed)).generate_state(2, np.uint64)
    compose.set_random_state(np.random.default_rng(numpy_seed), random.Random(int(python_seed)))


def to_tensor(pixels: Array) -> Tensor:
    """(H,W) or (H,W,C) floats as a contiguous (C,H,W) float32 tensor."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))
