"""Pictures of a detector's explanations; nothing is written here, figures are returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


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
