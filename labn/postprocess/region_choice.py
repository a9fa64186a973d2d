"""C3 and C1C: which region of a map (B, H, W) is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError, InputTypeError
from labn.postprocess.regions import Options, component_mask, contour_mask, masked, resized, threshold


def c1c(maps: Tensor, **options: Any) -> Tensor:
    """C1C (Iida, SIG-AM 2023): keep the connected component that holds the largest value, set the rest to `outside`.

    Args:
        maps: (B, H, W).
        options: fields of `labn.postprocess.Options` but `contour`.

    Returns:
        (B, H, W).

    Raises:
        TypeError: the option `contour`, of which C1C has none.
    """
    if "contour" in options:
        raise InputTypeError("c1c keeps a component and has no option 'contour'; c3 has.")
    return _per_map(maps, Options(**options), _component_only)


def c3(maps: Tensor, **options: Any) -> Tensor:
    """C3 (JSAI 2024), choice of contour and component: keep what lies in the filled contour AND in the component.

    Both are taken from the map binarised at the threshold. Where they do not meet, the component alone is kept, see
    `c3_fallback`.

    Args:
        maps: (B, H, W).
        options: fields of `labn.postprocess.Options`.

    Returns:
        (B, H, W).
    """
    return _per_map(maps, Options(**options), _both)


def c3_fallback(maps: Tensor, **options: Any) -> Tensor:
    """(B,) bool: contour and component of the map do not meet, so that `c3` keeps the component alone."""
    chosen = Options(**options)
    return torch.tensor([not _pair(resized(one, chosen), chosen)[2] for one in maps.detach().cpu()], device=maps.device)


def _per_map(maps: Tensor, options: Options, keep: Callable[[Tensor, Options], Tensor]) -> Tensor:
    if maps.ndim != 3:
        raise InputError(f"maps must be (B, H, W), got {tuple(maps.shape)}.")
    if not len(maps):
        return maps.clone()
    # Half precision cannot tell 256 levels of grey apart, and NumPy has no bfloat16.
    wide = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    kept = [masked(one, keep(resized(one, options), options), options) for one in wide]
    return torch.stack(kept).to(maps.dtype)


def _component_only(one: Tensor, options: Options) -> Tensor:
    return component_mask(one, one > threshold(one, options), options)


def _pair(one: Tensor, options: Options) -> tuple[Tensor, Tensor, bool]:
    binary = one > threshold(one, options)
    component, contour = component_mask(one, binary, options), contour_mask(one, binary, options)
    return component, contour, bool((component & contour).any())


def _both(one: Tensor, options: Options) -> Tensor:
    component, contour, meet = _pair(one, options)
    return component & contour if meet else component
