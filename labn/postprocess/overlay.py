"""Maps over pictures: as an array for one map, and as a figure with colour bars for several.

matplotlib is imported inside the functions: its import takes half a second, which `import labn` need not cost.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_ROW = 8
"""Maximum number of pictures in a row of a figure."""

OUTLIERS = 0.005
"""Share of the pixels of a signed map, those with the largest absolute values, that its colour scale ignores."""

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey picture under a map."""

# Inches of a cell of the figure: the picture's longer side, and what stands around it.
_SIDE, _LEFT, _BAR, _TICKS, _TITLE, _GAP = 1.8, 0.06, 0.08, 0.64, 0.3, 0.1


def displayable(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (C, H, W) as (H, W, 3) or grey (H, W) floats in [0, 1]."""
    m, s = (torch.tensor(v, dtype=torch.float32, device=image.device)[:, None, None] for v in (mean, std))
    pixels = (image.float() * s + m).clamp(0, 1).cpu().numpy()
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def color_scale(heat: np.ndarray) -> tuple[float, float, str]:
    """Lower limit, upper limit and colour map for a map: symmetric red-blue if it has negative values, else inferno.

    The limits of a signed map ignore the share `OUTLIERS` of its largest absolute values: gradients have a few pixels
    so large that all others would look like zero.
    """
    low, high = float(heat.min()), float(heat.max())
    if low < 0:
        bound = float(np.quantile(np.abs(heat), 1 - OUTLIERS)) or max(-low, high)
        return -bound, bound, "RdBu_r"
    around = max(0.5, 1e-6 * abs(low))  # of a constant map; 0.5 alone would be lost beside a large value
    return (low, high, "inferno") if high > low else (low - around, low + around, "inferno")


def tick_format(low: float, high: float) -> str:
    """Format string for ticks, with enough digits to distinguish values between two different limits.

    Matplotlib's own format writes a common offset beside the bar of a nearly flat map, which takes space from the axes.
    """
    # Significant digits to distinguish high from low, and one more for ticks between them.
    digits = 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))
    return f"%.{min(max(digits, 3), 9)}g"  # float32 has no more


def overlay(image: np.ndarray, heat: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """The grey picture under the colours of a map, in the map's own colour scale (`color_scale`).

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        heat: (H, W) map in its own units.
        alpha: opacity of the map, in [0, 1].

    Returns:
        (H, W, 3) uint8.

    Example:
        >>> overlay(np.zeros((2, 2)), np.array([[0.0, 1.0], [0.0, 0.0]]), alpha=1.0)[0].tolist()
        [[0, 0, 4], [252, 255, 164]]
    """
    import matplotlib

    low, high, colors = color_scale(heat)
    scaled = np.clip((heat - low) / (high - low), 0, 1)
    colored = matplotlib.colormaps[colors](scaled)[..., :3]
    mixed = (1 - alpha) * _grey(image)[..., None] + alpha * colored
    return (mixed * 255).round().clip(0, 255).astype(np.uint8)


def overlay_figure(
    image: np.ndarray, maps: Mapping[str, np.ndarray], mask: np.ndarray | None = None, title: str = ""
) -> Figure:
    """The picture, and every map over the grey picture with a colour bar; up to `PER_ROW` pictures per row.

    The outline of the ground truth is green.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        maps: method -> (H, W), in their own units.
        mask: (H, W) bool ground truth, or None.
        title: title of the figure.

    Example:
        >>> figure = overlay_figure(np.zeros((8, 8, 3)), {"gradcam": np.eye(8)}, title="a picture")
        >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
        ['image', 'gradcam']
    """
    return sheet_figure([(title, image, maps, mask)])


def sheet_figure(
    pictures: Sequence[tuple[str, np.ndarray, Mapping[str, np.ndarray], np.ndarray | None]],
) -> Figure:
    """Several overlay figures below each other.

    Args:
        pictures: title, image, maps and mask of every picture, as `overlay_figure` takes them.
    """
    from matplotlib.figure import Figure

    widest = max(len(maps) for _, _, maps, _ in pictures) + 1
    columns = -(-widest // -(-widest // PER_ROW))
    heights = [[_cell_height(image)] * -(-(len(maps) + 1) // columns) for _, image, maps, _ in pictures]
    height = sum(sum(rows) + _TITLE + _GAP for rows in heights)
    figure = Figure(figsize=((_LEFT + _SIDE + _BAR + _TICKS) * columns, height))
    top = height
    for (title, image, maps, mask), rows in zip(pictures, heights):
        # parse_math: a name with two dollar signs would be read as a formula.
        figure.text(0.5, (top - 0.05) / height, title, fontsize=9, ha="center", va="top", parse_math=False)
        top -= _TITLE
        cells = [(None, None), *maps.items()]
        for number, (name, heat) in enumerate(cells):
            bottom = top - sum(rows[: number // columns + 1])
            axes, bar = _cell(figure, image, number % columns, bottom)
            _draw(axes, bar, image, name, heat, mask)
        top -= sum(rows) + _GAP
    return figure


def png_bytes(figure: Figure, dpi: int = 120) -> bytes:
    """A figure as a PNG file.

    Example:
        >>> png_bytes(overlay_figure(np.zeros((4, 4)), {}), dpi=30)[:4]
        b'\\x89PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


def _picture_size(image: np.ndarray) -> tuple[float, float]:
    """Width and height of a picture in inches."""
    height, width = image.shape[:2]
    return _SIDE * width / max(height, width), _SIDE * height / max(height, width)


def _cell_height(image: np.ndarray) -> float:
    return _picture_size(image)[1] + _TITLE


def _cell(figure: Figure, image: np.ndarray, column: int, bottom: float) -> tuple[Axes, Axes]:
    """Axes of a picture and of its colour bar.

    The places are fixed: matplotlib's own layouts draw every figure several times to find them.
    """
    (width, height), (total_width, total_height) = _picture_size(image), figure.get_size_inches()
    left = column * (_LEFT + _SIDE + _BAR + _TICKS) + _LEFT
    axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))
    bar_left = left + width + 0.03
    bar = figure.add_axes((bar_left / total_width, bottom / total_height, _BAR / total_width, height / total_height))
    return axes, bar


def _draw(
    axes: Axes, bar: Axes, image: np.ndarray, name: str | None, heat: np.ndarray | None, mask: np.ndarray | None
) -> None:
    """Draw the picture, or a map over the grey picture, and the outline of the mask."""
    axes.set_axis_off()
    if heat is None:
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title("image", fontsize=9)
        bar.remove()
    else:
        low, high, colors = color_scale(heat)
        axes.imshow(_grey(image), cmap="gray", vmin=0, vmax=1)
        shown: Any = axes.imshow(heat, cmap=colors, vmin=low, vmax=high, alpha=0.6)
        axes.figure.colorbar(shown, cax=bar, format=tick_format(low, high))
        bar.tick_params(labelsize=6)
        axes.set_title(str(name), fontsize=9, parse_math=False)
    # A constant mask has no outline, and matplotlib would warn.
    if mask is not None and mask.any() and not mask.all():
        axes.contour(mask.astype(float), levels=[0.5], colors="lime", linewidths=0.8)


def _grey(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 2 else image @ np.array(GREY)
