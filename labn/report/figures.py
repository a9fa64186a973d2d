"""Figures of curves and detections, as matplotlib figures that the caller saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labn.postprocess.overlay import GREY

if TYPE_CHECKING:
    from labn.report.charts import Panel


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
    grey = image if image.ndim == 2 else image @ np.array(GREY)
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
