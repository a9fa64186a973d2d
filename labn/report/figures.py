"""Figures of maps, curves and detections, as matplotlib figures that the caller saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

if TYPE_CHECKING:
    from labn.report.charts import Panel

PER_ROW = 8
"""Maximum number of axes in a row of a figure."""

OUTLIERS = 0.005
"""Share of the pixels of a signed map, those with the largest absolute values, that its colour scale ignores."""


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
    return (low, high, "inferno") if high > low else (low - 0.5, low + 0.5, "inferno")


def tick_format(low: float, high: float) -> str:
    """Format string for ticks, with enough digits to distinguish values between two different limits.

    Matplotlib's own format writes a common offset beside the bar of a nearly flat map, which takes space from the axes.
    """
    # Significant digits to distinguish high from low, and one more for ticks between them.
    digits = 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))
    return f"%.{min(max(digits, 3), 9)}g"  # float32 has no more


def overlay_figure(
    image: np.ndarray, maps: dict[str, np.ndarray], mask: np.ndarray | None = None, title: str = ""
) -> Figure:
    """The picture, and every map over the grey picture with a colour bar; up to `PER_ROW` axes per row.

    The outline of the ground truth is green.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        maps: method -> (H, W), in their own units.
        mask: (H, W) bool ground truth, or None.
        title: title of the figure.
    """
    rows = -(-(len(maps) + 1) // PER_ROW)
    columns = -(-(len(maps) + 1) // rows)
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    axes = grid[: len(maps) + 1]
    for unused in grid[len(axes) :]:
        unused.set_axis_off()
    grey = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
    axes[0].imshow(image, cmap="gray", vmin=0, vmax=1)
    axes[0].set_title("image", fontsize=9)
    for axis, (name, heat) in zip(axes[1:], maps.items()):
        low, high, colors = color_scale(heat)
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
        shown = axis.imshow(heat, cmap=colors, vmin=low, vmax=high, alpha=0.6)
        bar = figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.02, format=tick_format(low, high))
        bar.ax.tick_params(labelsize=6)
        # parse_math: a name with two dollar signs would be read as a formula.
        axis.set_title(name, fontsize=9, parse_math=False)
    for axis in axes:
        axis.set_axis_off()
        # A constant mask has no outline, and matplotlib would warn.
        if mask is not None and mask.any() and not mask.all():
            axis.contour(mask.astype(float), levels=[0.5], colors="lime", linewidths=0.8)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def panels_figure(panels: Sequence[Panel]) -> Figure:
    """Panels of the report side by side in one figure, with bands and one legend."""
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        for line in panel.series:
            axis.plot(line.x, line.y, color=f"C{line.place % 10}", label=line.name)
            if line.low is not None and line.high is not None:
                axis.fill_between(line.x, line.low, line.high, color=f"C{line.place % 10}", alpha=0.15, linewidth=0)
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, ylim=panel.y_range)
    axes[-1].legend(fontsize=7)
    return figure


@dataclass(frozen=True)
class DetectionRow:
    """One detection in `detection_figure`.

    Attributes:
        title: class, score and source layer, for example.
        box: x1, y1, x2, y2 in pixels.
        maps: explained output -> (H, W) signed relevance.
    """

    title: str
    box: Sequence[float]
    maps: Mapping[str, np.ndarray]


def detection_figure(image: np.ndarray, rows: Sequence[DetectionRow], title: str = "") -> Figure:
    """One row per detection: the picture with its box, then every map; red supports and blue contradicts.

    Each map has its own symmetric scale, +- its largest absolute value, because relevance of different outputs is not
    comparable.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        rows: the detections; an empty sequence gives the bare picture.
        title: title of the figure.
    """
    columns = 1 + max((len(row.maps) for row in rows), default=0)
    figure = Figure(figsize=(2.2 * columns, 2.4 * max(len(rows), 1) + 0.3), layout="constrained")
    axes = figure.subplots(max(len(rows), 1), columns, squeeze=False)
    grey = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(image, cmap="gray", vmin=0, vmax=1)
    for line, row in zip(axes, rows):
        line[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        line[0].set_title(row.title, fontsize=7, parse_math=False)
        for axis, (name, heat) in zip(line[1:], row.maps.items()):
            # A map of zeros, such as that of a dead unit, has no scale.
            bound = float(np.abs(heat).max()) or 1.0
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
            axis.imshow(heat, cmap="RdBu_r", vmin=-bound, vmax=bound, alpha=_visibility(heat / bound))
            axis.set_title(name, fontsize=7)
        for axis in line[: 1 + len(row.maps)]:
            x1, y1, x2, y2 = row.box
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=0.9))
    figure.suptitle(title, fontsize=8, parse_math=False)
    return figure


def _visibility(heat: np.ndarray) -> np.ndarray:
    """Opacity in [0, 0.9] of each pixel of a map in [-1, 1]; the picture is visible where relevance is small."""
    return 0.9 * np.clip(np.abs(heat) * 4, 0, 1)
