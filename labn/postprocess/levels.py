"""Quantisation, sign selection and normalisation of maps (B, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from labn.errors import InputError

Sign = Literal["all", "positive", "negative", "absolute"]


def quantise(maps: Tensor, levels: int = 8, mode: Literal["floor", "round", "quantile"] = "floor") -> Tensor:
    """Heat quantisation: at most `levels` distinct values per map in the same order; a constant map is unchanged.

    Args:
        maps: (B, H, W).
        levels: q >= 2.
        mode: `floor`: v = min + floor((a - min) / (max - min) * (q - 1)) * (max - min) / (q - 1), so that only the
            maximum has the highest level; `round`: the nearest level; `quantile`: levels with equal numbers of pixels,
            whose value is the lowest of their pixels.

    Raises:
        InputError: fewer than 2 levels, or an unknown mode.

    Example:
        >>> from labn.postprocess import quantise
        >>> quantise(torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]]), levels=3)
        tensor([[[0., 0., 2., 2., 4.]]])
    """
    if levels < 2:
        raise InputError(f"levels must be at least 2, got {levels}.")
    if mode not in _QUANTISERS:
        raise InputError(f"mode={mode!r} is not one of {', '.join(map(repr, _QUANTISERS))}.")
    return _QUANTISERS[mode](maps, levels)


def _evenly(maps: Tensor, levels: int) -> Tensor:
    """Equidistant levels (B, levels) from each map's minimum to its maximum, both exact."""
    low, high = maps.flatten(1).aminmax(dim=1, keepdim=True)
    edges = low + (high - low) * (torch.arange(levels, dtype=maps.dtype, device=maps.device) / (levels - 1))
    edges[:, -1:] = high  # rounding would put the maximum below its own level
    return edges


def _floor(maps: Tensor, levels: int) -> Tensor:
    edges = _evenly(maps, levels)
    return _to_levels(maps, edges, edges[:, 1:])


def _round(maps: Tensor, levels: int) -> Tensor:
    edges = _evenly(maps, levels)
    return _to_levels(maps, edges, (edges[:, 1:] + edges[:, :-1]) / 2)


def _quantile(maps: Tensor, levels: int) -> Tensor:
    # The pixel at position i n / q in ascending order is the lowest of level i.
    flat = maps.flatten(1).sort(1).values
    starts = torch.arange(levels, device=maps.device) * flat.shape[1] // levels
    edges = flat[:, starts]
    return _to_levels(maps, edges, edges[:, 1:])


def _to_levels(maps: Tensor, edges: Tensor, borders: Tensor) -> Tensor:
    """Level i for values in [border i-1, border i).

    Comparing, rather than dividing and rounding, maps every level to itself: quantisation is idempotent.
    """
    level = torch.searchsorted(borders.contiguous(), maps.flatten(1).contiguous(), right=True)
    return edges.gather(1, level).view(maps.shape)


_QUANTISERS: dict[str, Callable[[Tensor, int], Tensor]] = {"floor": _floor, "round": _round, "quantile": _quantile}

_SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda maps: maps,
    "positive": lambda maps: maps.clamp(min=0),
    "negative": lambda maps: (-maps).clamp(min=0),
    "absolute": torch.abs,
}


def with_sign(maps: Tensor, sign: Sign = "positive") -> Tensor:
    """The `positive` part of maps, the magnitude of the `negative` part, the `absolute` value, or `all` unchanged.

    Raises:
        InputError: an unknown sign.

    Example:
        >>> from labn.postprocess import with_sign
        >>> with_sign(torch.tensor([[[-2.0, 1.0]]]), "negative")
        tensor([[[2., 0.]]])
    """
    if sign not in _SIGNS:
        raise InputError(f"sign={sign!r} is not one of {', '.join(map(repr, _SIGNS))}.")
    return _SIGNS[sign](maps)


def normalise(maps: Tensor, sign: Sign = "all", percentile: float = 98.0) -> Tensor:
    """Scale maps for display: divide by the value below which `percentile` % of the mass lies, and clip to [-1, 1].

    Args:
        maps: (B, H, W).
        sign: see `with_sign`; every sign except `all` gives [0, 1].
        percentile: in (0, 100], share of the cumulative sum of |values| in ascending order. An all-zero map stays zero.

    Raises:
        InputError: the percentile is outside of (0, 100].

    Example:
        >>> from labn.postprocess import normalise
        >>> normalise(torch.tensor([[[0.0, 1.0, -2.0, 2.0, 5.0]]]), percentile=50.0)
        tensor([[[ 0.0000,  0.5000, -1.0000,  1.0000,  1.0000]]])
    """
    if not 0 < percentile <= 100:
        raise InputError(f"percentile must lie in (0, 100], got {percentile}.")
    signed = with_sign(maps, sign)
    ascending = signed.abs().flatten(1).sort(1).values
    # In float64: the cumulative sum over many small values would saturate in float32.
    mass = ascending.double().cumsum(1)
    reached = (mass >= mass[:, -1:] * (percentile / 100)).int().argmax(1, keepdim=True)
    scale = ascending.gather(1, reached)[..., None]
    return torch.where(scale > 0, signed / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)


def unit_range(maps: Tensor) -> Tensor:
    """Scale every map (..., h, w) to [0, 1] by its own minimum and maximum; a constant map becomes 0.

    Example:
        >>> from labn.postprocess import unit_range
        >>> unit_range(torch.tensor([[[-1.0, 1.0, 3.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, 0)
