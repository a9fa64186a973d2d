"""Figures of maps and detections; nothing is written here, figures are returned."""

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

OUTLIERS = 0.005  # share of the pixels


def displayable(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (C, H, W) as (H, W, 3) or grey (H, W) floats in [0, 1]."""
    m, s = (torch.tensor(v, dtype=torch.float32, device=image.device)[:, None, None] for v in (mean, std))
    pixels = (image.float() * s + m).clamp(0, 1).cpu().numpy()
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def color_scale(heat: np.ndarray) -> tuple[float, float, str]:
    """Limits and colour map: symmetric red-blue for signed maps, from the minimum upwards for the others.

    The limits of a signed map leave its `OUTLIERS` largest absolute values out: a gradient has a few pixels that would
    make all others look like zero.
    """
    low, high = float(heat.min()), float(heat.max())
    if low < 0:
        bound = float(np.quantile(np.abs(heat), 1 - OUTLIERS)) or max(-low, high)
        return -bound, bound, "RdBu_r"
    return (low, high, "inferno") if high > low else (low - 0.5, low + 0.5, "inferno")


def tick_format(low: float, high: float) -> str:
    """Format of ticks between two different limits: whole, and with as many digits as it takes to tell them apart.

    A common offset of a nearly flat map, written beside the bar, would push it away.
    """
    digits = 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))
    return f"%.{min(max(digits, 3), 9)}g"  # float32 has no more


def overlay_figure(
    image: np.ndarray, maps: dict[str, np.ndarray], mask: np.ndarray | None = None, title: str = ""
) -> Figure:
    """The picture (ground-truth outline in green), then every map over the greyed picture, with colour bars.

    One row holds up to `PER_ROW` of them.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        maps: method -> (H, W), in their own units.
        mask: (H, W) bool, where it is known.
        title: of the whole figure.
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
        axis.set_title(name, fontsize=9, parse_math=False)
    for axis in axes:
        axis.set_axis_off()
        if mask is not None and mask.any() and not mask.all():
            axis.contour(mask.astype(float), levels=[0.5], colors="lime", linewidths=0.8)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def panels_figure(panels: Sequence[Panel]) -> Figure:
    """Charts of the report as one figure, a panel beside the other, with bands and one legend."""
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
    """One detection as it is drawn.

    Attributes:
        title: what it is, such as class, score and source layer.
        box: x1, y1, x2, y2 in pixels.
        maps: question -> (H, W) signed relevance.
    """

    title: str
    box: Sequence[float]
    maps: Mapping[str, np.ndarray]


def detection_figure(image: np.ndarray, rows: Sequence[DetectionRow], title: str = "") -> Figure:
    """One row per detection: the picture with its box, then every map, red supporting and blue contradicting.

    Each map has its own symmetric scale, +- its largest absolute value, because relevance of different questions is
    not comparable.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        rows: the detections; none gives the bare picture.
        title: of the whole figure.
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
    """Opacity in [0, 0.9]: the picture shows through where there is no relevance."""
    return 0.9 * np.clip(np.abs(heat) * 4, 0, 1)
