"""Contours and connected components of one map (H, W), found by OpenCV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError

SUMS_TO_ZERO = 1e-5  # |mean| relative to the mean |value|, below which a float32 map counts as summing to zero


@dataclass(frozen=True)
class Options:
    """The choice of a region. The papers leave these options open; the defaults are this project's.

    Attributes:
        threshold: pixels above it are foreground: the map's `mean` (0 for a signed map that sums to zero up to
            rounding), Otsu's threshold (`otsu`), a `quantile` of the map, or an `absolute` level.
        level: the quantile in [0, 1], or the absolute level; not used by `mean` and `otsu`.
        contour: among the filled outer contours (always 8-connected), the `largest` one, the one around the map's
            maximum (`contains_max`), or the `first` one that OpenCV returns, an order that depends on its version.
        component: the component of the largest value (`contains_max`), or the `largest` one.
        connectivity: connectivity of components, 8 or 4.
        resolution: side of the square on which the mask is found (C1C was published with 28); None: that of the map.
        gain: factor on the values inside the region (C1C was published with 3).
        outside: value of the other pixels: 0 (`zero`), or the map's minimum (`min`), which ranks them last in a signed
            map.

    Raises:
        InputError: an option has another value.

    Example:
        >>> from labn.postprocess import Options
        >>> Options(threshold="otsu").connectivity
        8
    """

    threshold: Literal["mean", "otsu", "quantile", "absolute"] = "mean"
    level: float = 0.5
    contour: Literal["largest", "contains_max", "first"] = "largest"
    component: Literal["contains_max", "largest"] = "contains_max"
    connectivity: Literal[4, 8] = 8
    resolution: int | None = None
    gain: float = 1.0
    outside: Literal["zero", "min"] = "zero"

    def __post_init__(self) -> None:
        choices = {
            "threshold": tuple(_THRESHOLDS),
            "contour": tuple(_CONTOURS),
            "component": tuple(_COMPONENTS),
            "connectivity": (4, 8),
            "outside": ("zero", "min"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}.")
        if self.threshold == "quantile" and not 0 <= self.level <= 1:
            raise InputError(f"level must lie in [0, 1] for threshold='quantile', got {self.level}.")


def resized(one: Tensor, options: Options) -> Tensor:
    """A map (H, W) resized to the working resolution, bilinearly with antialiasing."""
    if options.resolution is None:
        return one
    side = (options.resolution, options.resolution)
    return F.interpolate(one[None, None].float(), size=side, mode="bilinear", align_corners=False, antialias=True)[0, 0]


def threshold(one: Tensor, options: Options) -> float:
    """The value above which pixels of a map (H, W) are foreground."""
    return _THRESHOLDS[options.threshold](one, options.level)


def _mean(one: Tensor, level: float) -> float:
    values = one.double()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return high  # the computed mean of equal values may be a digit lower
    mean = float(values.mean())
    # For a map that sums to zero, the sign of the rounding error would decide about every pixel that is exactly 0.
    return mean if abs(mean) > SUMS_TO_ZERO * float(values.abs().mean()) else 0.0


def _quantile(one: Tensor, level: float) -> float:
    return float(np.quantile(one.detach().cpu().numpy(), level))


def _otsu(one: Tensor, level: float) -> float:
    low, high = float(one.min()), float(one.max())
    if low == high:
        return high
    # OpenCV's Otsu works on 256 levels of grey.
    grey = ((one - low) / (high - low) * 255).round().to(torch.uint8).cpu().numpy()
    best, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    # OpenCV's threshold is the highest background level; half a level above it separates the two classes.
    return low + (best + 0.5) / 255 * (high - low)


_THRESHOLDS: dict[str, Callable[[Tensor, float], float]] = {
    "mean": _mean,
    "otsu": _otsu,
    "quantile": _quantile,
    "absolute": lambda one, level: level,
}


def component_mask(one: Tensor, binary: Tensor, options: Options) -> Tensor:
    """Mask (H, W) of the chosen connected component of `binary`; all True for an empty `binary`."""
    if not binary.any():
        return torch.ones_like(binary)
    # Label 0 is the background.
    _, labels = cv2.connectedComponents(_bytes(binary), connectivity=options.connectivity)
    label = _COMPONENTS[options.component](one.detach().cpu().numpy(), labels)
    return torch.from_numpy(labels == label).to(binary.device)


def _label_of_max(values: np.ndarray, labels: np.ndarray) -> int:
    inside = np.where(labels > 0, values, -np.inf)
    return int(labels.flat[int(inside.argmax())])


def _largest_label(values: np.ndarray, labels: np.ndarray) -> int:
    return int(np.bincount(labels[labels > 0]).argmax())


_COMPONENTS = {"contains_max": _label_of_max, "largest": _largest_label}


def contour_mask(one: Tensor, binary: Tensor, options: Options) -> Tensor:
    """Mask (H, W) of the chosen outer contour of `binary`, holes filled; all True for an empty `binary`."""
    if not binary.any():
        return torch.ones_like(binary)
    # [-2]: older releases of OpenCV return the image first. CHAIN_APPROX_NONE keeps every boundary pixel.
    contours = cv2.findContours(_bytes(binary), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[-2]
    contour = _CONTOURS[options.contour](list(contours), one, binary)
    return torch.from_numpy(_filled(contour, binary) > 0).to(binary.device)


def filled_area(contour: np.ndarray) -> int:
    """Number of pixels inside and on a contour of neighbouring pixels, by Pick's theorem: area + boundary / 2 + 1."""
    boundary = len(contour) if len(contour) > 1 else 0
    return round(cv2.contourArea(contour) + boundary / 2 + 1)


def _filled(contour: np.ndarray, binary: Tensor) -> np.ndarray:
    canvas = np.zeros(tuple(binary.shape), dtype=np.uint8)
    cv2.drawContours(canvas, [contour], 0, 1, thickness=cv2.FILLED)
    return canvas


def _around_max(contours: list[np.ndarray], one: Tensor, binary: Tensor) -> np.ndarray:
    flat = torch.where(binary, one, -torch.inf).flatten()
    # OpenCV's points are (x, y); the test is 1 inside, 0 on the contour and -1 outside.
    row, column = divmod(int(flat.argmax()), binary.shape[1])
    return max(contours, key=lambda contour: cv2.pointPolygonTest(contour, (column, row), False))


_CONTOURS: dict[str, Callable[[list[np.ndarray], Tensor, Tensor], np.ndarray]] = {
    "largest": lambda contours, one, binary: max(contours, key=filled_area),
    "contains_max": _around_max,
    "first": lambda contours, one, binary: contours[0],
}


def masked(one: Tensor, mask: Tensor, options: Options) -> Tensor:
    """The map (H, W) times `gain` inside the mask, which is resized to the map, and `outside` elsewhere."""
    if mask.shape != one.shape:
        mask = F.interpolate(mask[None, None].float(), size=tuple(one.shape), mode="nearest")[0, 0] > 0
    outside = one.min() if options.outside == "min" else one.new_zeros(())
    return torch.where(mask.to(one.device), one * options.gain, outside)


def _bytes(binary: Tensor) -> np.ndarray:
    return binary.to(torch.uint8).cpu().numpy()
