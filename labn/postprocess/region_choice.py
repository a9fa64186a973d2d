"""C3 and C1C: the choice of one region of a map (B, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError, InputTypeError
from labn.postprocess.regions import Options, component_mask, contour_mask, masked, resized, threshold


def c1c(maps: Tensor, **options: Any) -> Tensor:
    """C1C (Iida, SIG-AM 2023): keep the connected component of the largest value and set the rest to `outside`.

    Args:
        maps: (B, H, W).
        options: fields of `labn.postprocess.Options` except `contour`.

    Returns:
        (B, H, W).

    Raises:
        InputTypeError: the option `contour`, which C1C does not have.

    Example:
        >>> from labn.postprocess import c1c
        >>> c1c(torch.tensor([[[9.0, 8.0, 0.0, 7.0]]]))
        tensor([[[9., 8., 0., 0.]]])
    """
    if "contour" in options:
        raise InputTypeError("c1c keeps a component and has no option 'contour'; c3 has.")
    return _per_map(maps, Options(**options), _component_only)


def c3(maps: Tensor, **options: Any) -> Tensor:
    """C3 (JSAI 2024), choice of contour and component: keep the pixels inside the filled contour and the component.

    Both come from the map binarised at the threshold. If they do not overlap, the component alone is kept; see
    `c3_fallback`.

    Args:
        maps: (B, H, W).
        options: fields of `labn.postprocess.Options`.

    Returns:
        (B, H, W).

    Example:
        >>> from labn.postprocess import c3
        >>> c3(torch.tensor([[[9.0, 8.0, 0.0, 7.0]]]))
        tensor([[[9., 8., 0., 0.]]])
    """
    return _per_map(maps, Options(**options), _both)


def c3_fallback(maps: Tensor, **options: Any) -> Tensor:
    """Whether contour and component of each map do not overlap, so that `c3` keeps the component alone, (B,) bool.

    Example:
        >>> from labn.postprocess import c3_fallback
        >>> c3_fallback(torch.tensor([[[9.0, 8.0, 0.0, 7.0]]]))
        tensor([False])
    """
    settings = Options(**options)
    overlaps = [_pair(resized(one, settings), settings)[2] for one in maps.detach().cpu()]
    return ~torch.tensor(overlaps, dtype=torch.bool, device=maps.device)


def _per_map(maps: Tensor, options: Options, keep: Callable[[Tensor, Options], Tensor]) -> Tensor:
    if maps.ndim != 3:
        raise InputError(f"maps must be (B, H, W), got {tuple(maps.shape)}.")
    if not len(maps):
        return maps.clone()
    # Half precision cannot distinguish 256 levels of grey, and NumPy has no bfloat16.
    wide = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    regions = [masked(one, keep(resized(one, options), options), options) for one in wide]
    return torch.stack(regions).to(maps.dtype)


def _component_only(one: Tensor, options: Options) -> Tensor:
    return component_mask(one, one > threshold(one, options), options)


def _pair(one: Tensor, options: Options) -> tuple[Tensor, Tensor, bool]:
    """Component, contour, and whether they overlap."""
    binary = one > threshold(one, options)
    component, contour = component_mask(one, binary, options), contour_mask(one, binary, options)
    return component, contour, bool((component & contour).any())


def _both(one: Tensor, options: Options) -> Tensor:
    component, contour, overlap = _pair(one, options)
    return component & contour if overlap else component
