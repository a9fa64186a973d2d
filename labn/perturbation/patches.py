"""Patches of an importance map: pooling, ranks with ties, and the number of patches per step.

The mask of the first n patches is `pixel_ranks < n`. All functions work on batches, on the maps' device, and no mask is
ever resized as floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError
from labn.perturbation.stateless_random import sample_integers

# Patches per step of the released evaluation, by image side and patch side.
STEPS: dict[int, dict[int, int]] = {
    224: {1: 500, 2: 100, 4: 20, 8: 10, 16: 5, 32: 1},
    512: {1: 10000, 2: 2500, 4: 500, 8: 100, 16: 20, 32: 10, 64: 5, 128: 1},
}


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches, (ceil(H / m), ceil(W / m)); the last ones are smaller if m does not divide the side.

    Raises:
        InputError: the patch is smaller than one pixel or larger than the image.
    """
    height, width = size
    if not 1 <= patch_size <= min(height, width):
        raise InputError(
            f"patch_size must be from 1 to {min(height, width)} for {height}x{width} maps, got {patch_size}."
        )
    return -(-height // patch_size), -(-width // patch_size)


def default_step(size: tuple[int, int], patch_size: int) -> int:
    """Patches per step: from the released table if it contains the size, else about a hundredth of all patches."""
    # The released evaluation defines steps for square images of two sizes only.
    rows, columns = patch_grid(size, patch_size)
    table = STEPS.get(size[0], {}) if size[0] == size[1] else {}
    return table.get(patch_size, max(1, round(rows * columns / 100)))


def _max(maps: Tensor, size: int) -> Tensor:
    return F.max_pool2d(maps, size, ceil_mode=True)


def _mean(maps: Tensor, size: int) -> Tensor:
    # In float64: a smaller edge patch has another divisor, whose rounding would break ties of equal patches.
    return F.avg_pool2d(maps.double(), size, ceil_mode=True, count_include_pad=False).to(maps.dtype)


def _sum(maps: Tensor, size: int) -> Tensor:
    # Zero padding adds nothing to a sum, and the average times the area is the sum.
    padded = F.pad(maps, (0, -maps.shape[-1] % size, 0, -maps.shape[-2] % size))
    return F.avg_pool2d(padded, size) * size**2


POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"max": _max, "mean": _mean, "sum": _sum}


def patch_pool(maps: Tensor, patch_size: int, pooling: str = "max") -> Tensor:
    """One value per patch, alpha_p = pool_m(alpha) (JSAI 2022, section 4: max).

    Args:
        maps: (B, H, W) floating.
        patch_size: side m in pixels; patches at the right and lower edge may be smaller.
        pooling: "max", "mean" or "sum" over the pixels of the patch.

    Returns:
        (B, ceil(H / m), ceil(W / m)).

    Raises:
        InputError: an unknown pooling, or a patch larger than the image.

    Example:
        >>> patch_pool(torch.arange(16.0).view(1, 4, 4), patch_size=2)
        tensor([[[ 5.,  7.],
                 [13., 15.]]])
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {sorted(POOLINGS)}, got {pooling!r}.")
    patch_grid((maps.shape[-2], maps.shape[-1]), patch_size)
    return maps if patch_size == 1 else POOLINGS[pooling](maps.unsqueeze(1), patch_size).squeeze(1)


def _competition_ranks(values: Tensor, seed: int, indices: Tensor | None) -> Tensor:
    """The number of strictly greater values, so that tied patches have one rank and enter together."""
    ordered, order = values.sort(dim=1, descending=True, stable=True)
    position = torch.arange(values.shape[1], device=values.device).expand_as(order)
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # The rank of a group of ties is the position of its first value in descending order.
    rank = torch.where(first, position, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, rank)


def _inverse(order: Tensor) -> Tensor:
    """The inverse of each row's permutation: an order of patches becomes their ranks."""
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position)


def _stable_ranks(values: Tensor, seed: int, indices: Tensor | None) -> Tensor:
    return _inverse(values.argsort(dim=1, descending=True, stable=True))


def _random_ranks(values: Tensor, seed: int, indices: Tensor | None) -> Tensor:
    """Ranks with ties in a random order, which depends on (seed, sample index) only."""
    indices = torch.zeros(len(values), dtype=torch.long) if indices is None else indices
    # A stable sort of values in random order breaks ties at random.
    shuffle = sample_integers(seed, indices.to(values.device), values.shape[1]).argsort(dim=1)
    ranks = _stable_ranks(values.gather(1, shuffle), seed, indices)
    return torch.empty_like(ranks).scatter_(1, shuffle, ranks)


TIES: dict[str, Callable[[Tensor, int, Tensor | None], Tensor]] = {
    "fraction": _competition_ranks,
    "stable": _stable_ranks,
    "random": _random_ranks,
    "threshold": _competition_ranks,
}


def patch_ranks(values: Tensor, ties: str = "fraction", *, seed: int = 0, indices: Tensor | None = None) -> Tensor:
    """The rank of every patch in descending order of value: a patch is among the first n exactly if its rank < n.

    Args:
        values: (B, N) or (B, h, w) patch values.
        ties: "fraction" and "threshold": competition rank (the number of strictly greater values), so that tied patches
            enter together; "stable": raster order among ties; "random": an order drawn from (seed, sample index).
        seed: seed of "random".
        indices: (B,) int64 sample indices for "random"; without them all samples use index 0.

    Returns:
        (B, N) int64 ranks in 0..N-1.

    Raises:
        InputError: an unknown name of `ties`.

    Example:
        >>> values = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
        >>> patch_ranks(values, "fraction"), patch_ranks(values, "stable")
        (tensor([[2, 0, 2, 1]]), tensor([[2, 0, 3, 1]]))
    """
    if ties not in TIES:
        raise InputError(f"ties must be one of {sorted(TIES)}, got {ties!r}.")
    return TIES[ties](values.flatten(1), seed, indices)


def top_patches(values: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest patches, ties in raster order: `patch_ranks(values, "stable") < count`.

    It is found by a selection, without sorting.

    Args:
        values: (B, N) or (B, h, w) patch values.
        count: number of patches, from 1 to N.

    Returns:
        (B, N) bool with `count` True values per sample.
    """
    flat = values.flatten(1)
    lowest = flat.kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    # All patches above the count-th value, and as many tied ones as remain, in raster order.
    above, tied = flat > lowest, flat == lowest
    remaining = count - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= remaining))


def ranks_to_pixels(ranks: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The rank of every pixel's patch: (B, N) -> (B, H, W) int32."""
    return patches_to_pixels(ranks.to(torch.int32), patch_size, size)


def patches_to_pixels(values: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The value of every pixel's patch: (B, N) -> (B, H, W), by repetition; edge patches are cropped."""
    height, width = size
    grid = values.view(len(values), *patch_grid(size, patch_size))
    return grid.repeat_interleave(patch_size, 1)[:, :height].repeat_interleave(patch_size, 2)[:, :, :width]
