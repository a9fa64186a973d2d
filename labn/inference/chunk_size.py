"""How many images go through a model at once."""

from __future__ import annotations

from torch import Tensor

from labn.errors import InputError

CPU_PIXELS = 4 * 224**2  # pixels per forward on the CPU: fewer waste calls, more outgrow the caches

CPU_CHUNK = 32  # upper limit, which small images would exceed


def cpu_chunk(images: Tensor) -> int:
    """The number of images per forward on a CPU, for many forwards of images (B, C, H, W).

    It is 4 at 224 pixels, 32 at 64 pixels and 1 at 512 pixels.
    """
    return max(1, min(CPU_CHUNK, CPU_PIXELS // (images.shape[-2] * images.shape[-1])))


def check_chunk_size(size: int | None) -> None:
    """Check that `size` is a number of images, or None for an automatic choice.

    Raises:
        InputError: the size is below 1.
    """
    if size is not None and size < 1:
        raise InputError(f"chunk_size must be at least 1, got {size}.")
