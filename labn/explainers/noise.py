"""Gaussian noise that depends on (seed, sample index, draw), never on rank or batch."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_noise(images: Tensor, indices: Tensor | None, seed: int, draw: int) -> Tensor:
    """Standard normal noise (B, C, H, W), or (1, C, H, W) from one fixed bank where there are no indices.

    Drawn on the CPU in float64, so that every device and dtype sees the same numbers.

    Args:
        images: (B, C, H, W), for shape, device and dtype.
        indices: (B,) int64 positions in the data set, or None.
        seed: any integer.
        draw: which of an image's draws, from 0.
    """
    numbers = [0] if indices is None else indices.tolist()
    return torch.stack([_draw(images.shape[1:], (seed * 1_000_003 + n) * 1_009 + draw) for n in numbers]).to(images)


def _draw(shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def noise_scale(images: Tensor, std: float, relative: bool) -> Tensor:
    """Standard deviation (B, 1, 1, 1): `std` itself, or that fraction of each image's value range."""
    flat = images.flatten(1)
    span = flat.amax(1) - flat.amin(1) if relative else torch.ones_like(flat[:, 0])
    return (std * span).view(-1, 1, 1, 1)


def check_noise(n_samples: int, std: float) -> None:
    """Raise ValueError unless there is a sample and the standard deviation is not negative."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
    if not std >= 0:
        raise ValueError(f"std must not be negative, got {std}.")
