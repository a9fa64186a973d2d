"""Levels and scales of maps (B, H, W): heat quantisation, sign and percentile normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from labn.errors import InputError

Sign = Literal["all", "positive", "negative", "absolute"]


def quantise(maps: Tensor, levels: int = 8, mode: Literal["floor", "round", "quantile"] = "floor") -> Tensor:
    """Heat quantisation: at most `levels` distinct values per map, order kept; a constant map is unchanged.

    `floor`: v = min + floor((a - min) / (max - min) * (q - 1)) * (max - min) / (q - 1), so that the maximum keeps a
    level of its own; `round` takes the nearest level; `quantile` puts equally many pixels into every level, whose value
    is its lower edge.

    Args:
        maps: (B, H, W).
        levels: q >= 2.
        mode: how values go to levels.
    """
    if levels < 2:
        raise InputError(f"levels must be at least 2, got {levels}.")
    if mode not in _QUANTISERS:
        raise InputError(f"mode={mode!r} is not one of {', '.join(map(repr, _QUANTISERS))}.")
    return _QUANTISERS[mode](maps, levels)


def _evenly(maps: Tensor, levels: int) -> Tensor:
    """(B, levels) values from the minimum to the maximum, both met exactly."""
    low, high = maps.flatten(1).aminmax(dim=1, keepdim=True)
    edges = low + (high - low) * (torch.arange(levels, dtype=maps.dtype, device=maps.device) / (levels - 1))
    edges[:, -1:] = high
    return edges


def _floor(maps: Tensor, levels: int) -> Tensor:
    edges = _evenly(maps, levels)
    return _to_levels(maps, edges, edges[:, 1:])


def _round(maps: Tensor, levels: int) -> Tensor:
    edges = _evenly(maps, levels)
    return _to_levels(maps, edges, (edges[:, 1:] + edges[:, :-1]) / 2)


def _quantile(maps: Tensor, levels: int) -> Tensor:
    flat = maps.flatten(1).sort(1).values
    starts = torch.arange(levels, device=maps.device) * flat.shape[1] // levels
    edges = flat[:, starts]
    return _to_levels(maps, edges, edges[:, 1:])


def _to_levels(maps: Tensor, edges: Tensor, borders: Tensor) -> Tensor:
    """Level i for values in [border i-1, border i): found by comparison, so that a level is mapped to itself."""
    which = torch.searchsorted(borders.contiguous(), maps.flatten(1).contiguous(), right=True)
    return edges.gather(1, which).view(maps.shape)


_QUANTISERS: dict[str, Callable[[Tensor, int], Tensor]] = {"floor": _floor, "round": _round, "quantile": _quantile}

_SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda maps: maps,
    "positive": lambda maps: maps.clamp(min=0),
    "negative": lambda maps: (-maps).clamp(min=0),
    "absolute": torch.abs,
}


def with_sign(maps: Tensor, sign: Sign = "positive") -> Tensor:
    """Keep `positive` values, the size of `negative` ones, the `absolute` value, or `all`."""
    if sign not in _SIGNS:
        raise InputError(f"sign={sign!r} is not one of {', '.join(map(repr, _SIGNS))}.")
    return _SIGNS[sign](maps)


def normalise(maps: Tensor, sign: Sign = "all", percentile: float = 98.0) -> Tensor:
    """For display: divide by the value below which `percentile` % of the total |mass| lies, and clip to [-1, 1].

    Args:
        maps: (B, H, W).
        sign: see `with_sign`; all but `all` give [0, 1].
        percentile: of the cumulative mass of |values| in ascending order, in (0, 100]. An all-zero map stays zero.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"percentile must lie in (0, 100], got {percentile}.")
    chosen = with_sign(maps, sign)
    order = chosen.abs().flatten(1).sort(1).values
    mass = order.double().cumsum(1)
    reached = (mass >= mass[:, -1:] * (percentile / 100)).int().argmax(1, keepdim=True)
    scale = order.gather(1, reached)[..., None]
    return torch.where(scale > 0, chosen / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)


def unit_range(maps: Tensor) -> Tensor:
    """Every map (..., h, w) brought to [0, 1] by its own minimum and maximum; a constant one becomes 0."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, 0)
