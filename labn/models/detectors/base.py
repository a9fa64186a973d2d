"""The interface of single-shot detectors for relevance propagation, decoding and scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from labn.errors import InputError

Coordinate = Literal["cx", "cy", "w", "h"]
COORDINATES: tuple[Coordinate, ...] = ("cx", "cy", "w", "h")


@dataclass(frozen=True)
class Predictions:
    """Raw predictions for every default box, before any threshold.

    Attributes:
        classes: (B, P, K) class logits; K counts the background where the detector has one.
        offsets: (B, P, 4) regression outputs t of cx, cy, w, h.
        grids: height and width of every source map, in the order of the default boxes.
    """

    classes: Tensor
    offsets: Tensor
    grids: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> Tensor:
        """All predictions (B, P (K + 4)) in one row per image, the output that relevance propagation starts from."""
        # Not named `logits`: explainers and metrics of classifiers recognise their networks by that attribute.
        return torch.cat([self.classes.flatten(1), self.offsets.flatten(1)], 1)


@dataclass(frozen=True)
class Head:
    """The last convolutions over one source map.

    Attributes:
        classification: qualified module name of the convolution with a K channels, box-major (channel b K + k).
        localisation: likewise with 4 a channels (channel 4 b + t).
        boxes: default boxes per cell, a.
    """

    classification: str
    localisation: str
    boxes: int


@dataclass(frozen=True)
class Unit:
    """The position of a default box: source map, row, column, and number among the boxes of its cell."""

    source: int
    row: int
    column: int
    box: int


@dataclass(frozen=True)
class Layout:
    """The order of the default boxes: by source map, row, column, box of the cell (SSD, Liu et al. 2016, section 2.1).

    Attributes:
        grids: (height, width) of every source map.
        boxes: default boxes per cell of every source map.
    """

    grids: tuple[tuple[int, int], ...]
    boxes: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first default box of every source map, and the number of all boxes at the end."""
        return tuple(accumulate((h * w * a for (h, w), a in zip(self.grids, self.boxes)), initial=0))

    def unit(self, prior: int | Tensor) -> Unit:
        """The unit of default box `prior`.

        Raises:
            IndexError: the default box does not exist.

        Example:
            >>> Layout(grids=((2, 2), (1, 1)), boxes=(3, 2)).unit(7)
            Unit(source=0, row=1, column=0, box=1)
        """
        starts, prior = self.starts, int(prior)
        if not 0 <= prior < starts[-1]:
            raise IndexError(f"default box {prior} does not exist: the detector has {starts[-1]}.")
        source = next(s for s in range(len(self.grids)) if prior < starts[s + 1])
        cell, box = divmod(prior - starts[source], self.boxes[source])
        return Unit(source, *divmod(cell, self.grids[source][1]), box)

    def prior(self, unit: Unit) -> int:
        """The index of the default box at `unit`, the inverse of `unit()`."""
        cell = unit.row * self.grids[unit.source][1] + unit.column
        return self.starts[unit.source] + cell * self.boxes[unit.source] + unit.box


class Detector(nn.Module, ABC):
    """The base class of single-shot detectors; a detector of one's own is a subclass of about 30 lines.

    A subclass runs the network on normalised images, names the last convolutions of its heads, and returns its default
    boxes. Decoding, explanation (`labn.explainers.CRP`) and scores use these:

        class MySSD(Detector):
            num_classes = 3  # background, cat, dog

            def __init__(self, network):
                super().__init__()
                self.network = network

            def forward(self, images):
                maps = self.network.features(images)  # a list of source maps
                classes = [per_box(head(m), 3) for head, m in zip(self.network.classify, maps)]
                offsets = [per_box(head(m), 4) for head, m in zip(self.network.locate, maps)]
                grids = tuple((m.shape[2], m.shape[3]) for m in maps)
                return Predictions(torch.cat(classes, 1), torch.cat(offsets, 1), grids)

            def heads(self):
                return tuple(Head(f"network.classify.{i}", f"network.locate.{i}", boxes=2) for i in range(2))

            def default_boxes(self, size, grids, like):
                return torch.cat([my_boxes(grid, size) for grid in grids]).to(like)

    Attributes:
        num_classes: number of classes K, including the background.
        background: channel of the background class; None without a background class.
        variances: factors of the box code, see `decode_boxes`.
        class_names: names of the K classes; None where they are not known.
    """

    num_classes: int
    background: int | None = 0
    variances: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    class_names: tuple[str, ...] | None = None

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Raw predictions for normalised images (B, C, H, W)."""

    @abstractmethod
    def heads(self) -> tuple[Head, ...]:
        """The heads, in the order of the source maps."""

    @abstractmethod
    def default_boxes(self, size: tuple[int, int], grids: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
        """Default boxes (P, 4): cx, cy, w, h in pixels of images of `size` (H, W), with dtype and device of `like`."""

    def layout(self, grids: tuple[tuple[int, int], ...]) -> Layout:
        """The order of the default boxes over source maps of these sizes."""
        return Layout(grids, tuple(head.boxes for head in self.heads()))

    def class_index(self, wanted: int | str) -> int:
        """The channel of a class, from its channel or name.

        Raises:
            InputError: the detector does not have the class.
        """
        known = self.class_names or ()
        index = known.index(wanted) if isinstance(wanted, str) and wanted in known else wanted
        if isinstance(index, str) or int(index) != index or not 0 <= index < self.num_classes:
            names = f" ({', '.join(known)})" if known else ""
            raise InputError(f"class {wanted!r} is not one of the detector's {self.num_classes} classes{names}.")
        return int(index)


def per_box(output: Tensor, columns: int) -> Tensor:
    """Output (B, a * columns, h, w) of a box-major head as (B, h w a, columns), in the order of `Layout`.

    Example:
        >>> per_box(torch.zeros(1, 6, 2, 3), columns=3).shape
        torch.Size([1, 12, 3])
    """
    batch, _, height, width = output.shape
    return output.view(batch, -1, columns, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, columns)
