"""The steps from a picture file to a network's input; checkpoints store them, so that they suffice for predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labn.errors import InputError
from labn.io.fits import read_picture
from labn.io.images import MAX_PIXELS, blacken_caption, crop, to_square

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's red, green and blue, of values in [0, 1]."""

KEY = "preprocessing"
"""Key of the preprocessing in checkpoints."""


@dataclass(frozen=True)
class Preprocessing:
    """Blacken the caption, crop, bring to a square, and normalise.

    Attributes:
        image_size: side S of the square in pixels.
        mean: mean of each channel for values in [0, 1].
        std: standard deviation of each channel for values in [0, 1].
        crop: left, top, right, bottom as fractions of the picture's size; None uses the whole picture.
        shorter: None squashes the picture; else its shorter side is resized to this many pixels and the central square
            is taken.
        class_names: names of the classes; empty where they are not known.
        caption: share of the height that is painted black at the bottom, because text is written there.
        fits_range: physical values of FITS files that become black and white; None where FITS files are not read.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: tuple[float, float, float, float] | None = None
    shorter: int | None = None
    class_names: list[str] = field(default_factory=list)
    caption: float = 0.0
    fits_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the numbers, which may come from the checkpoint of a stranger."""
        numbers = (*self.mean, *self.std)
        if type(self.image_size) is not int or not 1 <= self.image_size <= math.isqrt(MAX_PIXELS):
            raise InputError(f"image_size is {self.image_size!r}; it must be a number of pixels up to 11585.")
        if len(self.mean) != len(self.std) or not all(math.isfinite(x) for x in numbers) or min(self.std) <= 0:
            raise InputError(f"mean {self.mean} and std {self.std} must be one number per channel, std above 0.")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def plain(self) -> dict[str, Any]:
        """The attributes as a dict of lists, numbers and strings, which a checkpoint read as plain data may hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def read(self, path: Path) -> np.ndarray:
        """Pixels (S, S, C) uint8 of a picture file, prepared as the data modules prepare theirs.

        Raises:
            BadImageError: the file cannot be decoded.
            InputError: `crop` leaves no pixel of the picture, or a FITS keyword is missing.

        Example:
            >>> import tempfile, cv2
            >>> preprocessing = Preprocessing(image_size=4, mean=[0.5] * 3, std=[0.25] * 3, shorter=6)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder) / "red.png"
            ...     _ = cv2.imwrite(str(path), np.full((12, 24, 3), (0, 0, 200), np.uint8))  # OpenCV writes BGR
            ...     pixels = preprocessing.read(path)
            >>> pixels.shape, pixels[0, 0].tolist()
            ((4, 4, 3), [200, 0, 0])
        """
        pixels = blacken_caption(read_picture(path, self.channels, self.fits_range), self.caption)
        return to_square(crop(pixels, self.crop), self.image_size, self.shorter)

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """Normalise pixels (H, W, C) uint8 to an image (C, H, W) float32: (pixels / 255 - mean) / std."""
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
        mean, std = (torch.tensor(list(values), dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std

    def class_name(self, number: int) -> str:
        """Name of a class, or `class <number>` where it is not known."""
        return self.class_names[number] if number < len(self.class_names) else f"class {number}"
