"""Patches of an importance map: pooling, ranks with ties, and the number of patches per step.

A keep mask is `pixel_ranks < n`: everything is batched, on the maps' device, and masks are never resized as floats.
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
    """Rows and columns of patches, (ceil(H / m), ceil(W / m)); the last ones are smaller where m does not divide.

    Raises:
        ValueError: the patch is smaller than one pixel or larger than the image.
    """
    height, width = size
    if not 1 <= patch_size <= min(height, width):
        raise InputError(
            f"patch_size must be from 1 to {min(height, width)} for {height}x{width} maps, got {patch_size}."
        )
    return -(-height // patch_size), -(-width // patch_size)


def default_step(size: tuple[int, int], patch_size: int) -> int:
    """Patches per step: the released table where it has the size, else about a hundredth of all patches."""
    rows, columns = patch_grid(size, patch_size)
    table = STEPS.get(size[0], {}) if size[0] == size[1] else {}
    return table.get(patch_size, max(1, round(rows * columns / 100)))


def _max(maps: Tensor, size: int) -> Tensor:
    return F.max_pool2d(maps, size, ceil_mode=True)


def _mean(maps: Tensor, size: int) -> Tensor:
    # In float64: an edge patch has a divisor of its own, whose rounding would untie equal patches.
    return F.avg_pool2d(maps.double(), size, ceil_mode=True, count_include_pad=False).to(maps.dtype)


def _sum(maps: Tensor, size: int) -> Tensor:
    padded = F.pad(maps, (0, -maps.shape[-1] % size, 0, -maps.shape[-2] % size))
    return F.avg_pool2d(padded, size) * size**2


POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"max": _max, "mean": _mean, "sum": _sum}


def patch_pool(maps: Tensor, patch_size: int, pooling: str = "max") -> Tensor:
    """One value per patch, alpha_p = pool_m(alpha) (JSAI 2022, section 4: max).

    Args:
        maps: (B, H, W) floating.
        patch_size: side m in pixels; patches at the right and lower edge are smaller where m does not divide.
        pooling: "max", "mean" or "sum" over the patch's own pixels.

    Returns:
        (B, ceil(H / m), ceil(W / m)).

    Raises:
        ValueError: unknown pooling, or a patch larger than the image.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {sorted(POOLINGS)}, got {pooling!r}.")
    patch_grid((maps.shape[-2], maps.shape[-1]), patch_size)
    return maps if patch_size == 1 else POOLINGS[pooling](maps.unsqueeze(1), patch_size).squeeze(1)


def _competition_ranks(values: Tensor, seed: int, indices: Tensor | None) -> Tensor:
    """Number of strictly greater values, so that tied patches share a rank and enter together."""
    ordered, order = values.sort(dim=1, descending=True, stable=True)
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = torch.where(first, place, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, group)


def _inverse(order: Tensor) -> Tensor:
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def _stable_ranks(values: Tensor, seed: int, indices: Tensor | None) -> Tensor:
    return _inverse(values.argsort(dim=1, descending=True, stable=True))


def _random_ranks(values: Tensor, seed: int, indices: Tensor | None) -> Tensor:
    """Ties in a random order that depends on (seed, sample index) only."""
    indices = torch.zeros(len(values), dtype=torch.long) if indices is None else indices
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
    """Rank of every patch, the most important first: a patch is among the first n exactly if its rank < n.

    Args:
        values: (B, N) or (B, h, w) patch values.
        ties: "fraction": competition rank (the number of strictly greater values), so tied patches enter together;
            "threshold": the same; "stable": raster order among ties; "random": an order drawn from (seed, sample
            index), as a check.
        seed: for "random".
        indices: (B,) int64 sample indices for "random"; without them all samples use index 0.

    Returns:
        (B, N) int64 ranks in 0..N-1.
    """
    if ties not in TIES:
        raise InputError(f"ties must be one of {sorted(TIES)}, got {ties!r}.")
    return TIES[ties](values.flatten(1), seed, indices)


def top_patches(values: Tensor, count: int) -> Tensor:
    """The `count` highest values of each row, ties in raster order: `patch_ranks(values, "stable") < count`, unsorted.

    Args:
        values: (B, N) or (B, h, w) patch values.
        count: from 1 to N.

    Returns:
        (B, N) bool with `count` True per row.
    """
    flat = values.flatten(1)
    lowest = flat.kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    above, tied = flat > lowest, flat == lowest
    room = count - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


def ranks_to_pixels(ranks: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Every pixel's patch rank: (B, N) -> (B, H, W) int32."""
    return patches_to_pixels(ranks.to(torch.int32), patch_size, size)


def patches_to_pixels(values: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Every pixel's patch value: (B, N) -> (B, H, W), by repetition (edge patches cropped)."""
    height, width = size
    grid = values.view(len(values), *patch_grid(size, patch_size))
    return grid.repeat_interleave(patch_size, 1)[:, :height].repeat_interleave(patch_size, 2)[:, :, :width]
