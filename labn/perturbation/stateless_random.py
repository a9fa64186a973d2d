"""Random numbers as a function of (seed, sample index, position): without state, equal on every device and rank."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the splitmix64 increment, as a signed integer

# Shifts and multipliers of splitmix64, the multipliers as signed integers too.
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own shift copies the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(counter: Tensor) -> Tensor:
    """The splitmix64 mixing function (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors, modulo 2**64."""
    # int64 products wrap modulo 2**64, as the unsigned ones of the definition do.
    mixed = counter * _GOLDEN
    for bits, multiplier in _MIX:
        mixed = (mixed ^ _shift_right(mixed, bits)) * multiplier
    return mixed ^ _shift_right(mixed, 31)


def sample_integers(seed: int, indices: Tensor, count: int, stream: int = 0) -> Tensor:
    """Random int64 numbers (B, count), which depend on (seed, stream, sample index, position) only.

    Args:
        seed: any integer.
        indices: (B,) integer positions of the samples in their data set.
        count: number of values per sample.
        stream: makes several uses of one seed independent of each other.

    Example:
        >>> both = sample_integers(0, torch.tensor([3, 8]), 2)
        >>> torch.equal(both[1:], sample_integers(0, torch.tensor([8]), 2))
        True
    """
    indices = indices.long()  # the products would wrap earlier in a type of fewer bits
    # Each ingredient is mixed before the next is added, so that neighbouring seeds and samples are unrelated.
    start = splitmix64(torch.full_like(indices, seed)) + stream
    key = splitmix64((splitmix64(start) if stream else start) + indices)
    position = torch.arange(1, count + 1, device=indices.device)
    return splitmix64(key[:, None] + position)


def sample_uniform(
    seed: int, indices: Tensor, count: int, dtype: torch.dtype = torch.float32, stream: int = 0
) -> Tensor:
    """Uniform numbers (B, count) in [0, 1) with 24 random bits, as `dtype`; arguments as for `sample_integers`."""
    wide = torch.promote_types(dtype, torch.float32)  # 2^24 is infinite in half precision
    return (_shift_right(sample_integers(seed, indices, count, stream), 40).to(wide) / (1 << 24)).to(dtype)


LEVELS = 1 << 16
"""Number of values that `sample_normal` can take."""


@functools.cache
def _normal_levels() -> Tensor:
    """The middles of `LEVELS` intervals that a standard normal variable hits equally often, scaled to variance 1."""
    middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = torch.special.ndtri(middles)
    levels = (levels - levels.flip(0)) / 2  # exactly symmetric
    return levels / levels.square().mean().sqrt()


def sample_normal(
    seed: int, indices: Tensor, count: int, dtype: torch.dtype = torch.float32, stream: int = 0
) -> Tensor:
    """Standard normal numbers (B, count), as `dtype`; arguments as for `sample_integers`.

    They are looked up in a table of 65536 values up to 4.3 standard deviations, so that every device gives the same
    numbers: logarithm and cosine, which other methods need, differ between devices in the last digit.

    Example:
        >>> numbers = sample_normal(0, torch.tensor([3]), 10_000, torch.float64)
        >>> bool(numbers.mean().abs() < 0.03), bool((numbers.std() - 1).abs() < 0.03)
        (True, True)
    """
    # One hash has the bits of four numbers.
    hashes = sample_integers(seed, indices, -(-count // 4), stream)
    levels = torch.stack([_shift_right(hashes, 16 * part) & (LEVELS - 1) for part in range(4)], 2)
    return _normal_levels().to(indices.device, dtype)[levels.flatten(1)[:, :count]]
