"""What a picture goes through before a network sees it; kept in checkpoints, so that they can be used alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labn.io.fits import read_picture
from labn.io.images import blacken_caption, crop, to_square

KEY = "preprocessing"
"""Where checkpoints keep it."""


@dataclass(frozen=True)
class Preprocessing:
    """Crop or blacken the caption, squash to a square (or cut it out of the middle), normalise.

    Attributes:
        image_size: side of the square in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel, likewise.
        crop: left, top, right, bottom in fractions of the picture; None for no crop.
        shorter: None squashes; else the shorter side is resized to it and the central square taken.
        class_names: one per class; empty where they are not known.
        caption: share of the height, at the bottom, that is painted black because it carries text.
        fits_range: physical values of a FITS picture that become black and white; None where such files are not read.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: tuple[float, float, float, float] | None = None
    shorter: int | None = None
    class_names: list[str] = field(default_factory=list)
    caption: float = 0.0
    fits_range: tuple[float, float] | None = None

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def plain(self) -> dict[str, Any]:
        """Lists, numbers and texts only, which a checkpoint can hold."""
        found = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

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
        """Pixels (H, W, C) uint8 as the normalised float32 image (C, H, W)."""
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
        mean, std = (torch.tensor(list(values), dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std

    def class_name(self, number: int) -> str:
        """Name of a class, else its number."""
        return self.class_names[number] if number < len(self.class_names) else f"class {number}"
