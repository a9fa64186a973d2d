"""The recorded forward pass of a detector over one image, and relevance that starts at its heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError
from labn.inference.chunk_size import check_chunk_size
from labn.lrp.config import Config
from labn.lrp.engine import backward, forward
from labn.lrp.rules.conservation import ConservationReport, Entry
from labn.lrp.tracing.graph import Node
from labn.lrp.weight_transforms import Identity
from labn.models.detectors import Detections, Detector, Predictions, Thresholds, Unit, detect


@dataclass(frozen=True)
class Window:
    """The input window of one unit of a head.

    Attributes:
        value: index of the layer's input in the recorded graph.
        rows, columns: position of the window in the padded input.
        padding: padding of the input in pixels (vertical, horizontal).
        inputs: (C, h, w), the padded input inside the window.
        weights: (n, C, h, w), weights of the unit's n outputs (K classes, or 4 coordinates).
    """

    value: int
    rows: slice
    columns: slice
    padding: tuple[int, int]
    inputs: Tensor
    weights: Tensor

    @property
    def contributions(self) -> Tensor:
        """Contribution x_i w_ik (n, C h w) of every input to every output, without the bias."""
        return (self.inputs * self.weights).flatten(1)


@dataclass(frozen=True)
class Start:
    """Relevance (C, h, w) in a window, the start of one map."""

    window: Window
    relevance: Tensor


class DetectionTrace:
    """A recorded forward pass of a detector over one image.

    Args:
        detector: in eval mode, of the image's device and dtype (see `labn.inference.modes`).
        image: (1, C, H, W), normalised, in float32 or float64.
        config: the rules of the layers before the heads.

    Attributes:
        predictions: class logits and offsets of every default box.
        layout: the order of the default boxes.

    Raises:
        InputError: more than one image, or heads whose outputs do not fit `num_classes` and `heads()`.
    """

    def __init__(self, detector: Detector, image: Tensor, config: Config) -> None:
        if len(image) != 1:
            raise InputError(f"a detection trace holds one image, got {len(image)}.")
        self.detector, self.image = detector, image
        self.trace = forward(detector, image, config, _read_logits)
        heads = detector.heads()
        self._classes = [self._node(head.classification) for head in heads]
        self._offsets = [self._node(head.localisation) for head in heads]
        grids = tuple((node.call.shape[-2], node.call.shape[-1]) for node in self._classes)
        self.layout = detector.layout(grids)
        count, classes = self.layout.starts[-1], detector.num_classes
        logits = self.trace.logits
        if logits.shape[1] != count * (classes + 4):
            raise InputError(
                f"{type(detector).__name__} predicts {logits.shape[1]} values; its heads() and num_classes say "
                f"{count} default boxes x ({classes} classes + 4 coordinates)."
            )
        # `Predictions.rows` holds all class logits first, then all offsets.
        scores, offsets = logits.split([count * classes, count * 4], 1)
        self.predictions = Predictions(scores.view(1, count, classes), offsets.view(1, count, 4), grids)

    def _node(self, name: str) -> Node:
        graph = self.trace.graph
        node = graph.nodes.get(graph.outputs.get(name, -1))
        if node is None or node.layer is None or node.layer.operation != "conv2d" or node.layer.options["groups"] != 1:
            raise InputError(
                f"heads() names '{name}', which must be a 2-D convolution without groups in the forward pass of "
                f"{type(self.detector).__name__}."
            )
        return node

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[-2], self.image.shape[-1]

    def detections(self, thresholds: Thresholds | None = None) -> Detections:
        """The detections of the image; the result is empty where there is none."""
        return detect(self.detector, self.predictions, self.size, thresholds)[0]

    def window(self, prior: int | Tensor, localisation: bool) -> Window:
        """The input window of a default box's class outputs, or of its coordinate outputs with `localisation`.

        Raises:
            IndexError: there is no such default box.
        """
        unit = self.layout.unit(prior)
        node = (self._offsets if localisation else self._classes)[unit.source]
        return self._window(node, unit, 4 if localisation else self.detector.num_classes)

    def _window(self, node: Node, unit: Unit, outputs: int) -> Window:
        assert node.layer is not None
        # Box-major heads: the outputs of one default box are consecutive channels.
        kernel = node.layer.prepared(Identity(), True)[unit.box * outputs : (unit.box + 1) * outputs]
        options = node.layer.options
        stride, padding, dilation = (_pair(options[name]) for name in ("stride", "padding", "dilation"))
        rows, columns = (
            slice(at * s, at * s + d * (k - 1) + 1, d)
            for at, s, d, k in zip((unit.row, unit.column), stride, dilation, kernel.shape[2:])
        )
        inputs = F.pad(self.trace.saved[node.index][0][0], (padding[1], padding[1], padding[0], padding[0]))
        return Window(node.inputs[0], rows, columns, padding, inputs[:, rows, columns], kernel)

    def maps(self, starts: list[Start], until: int = 0, chunk_size: int | None = None) -> Tensor:
        """Relevance (T, ...) at the value `until` (0: the pixels) from T starts, several per sweep.

        Raises:
            UnsupportedError: a layer that relevance passes has no rule; the message names it.
            InputError: no relevance reaches `until`, or `chunk_size` is below 1.
        """
        check_chunk_size(chunk_size)
        size = chunk_size or (4 if self.image.device.type == "cpu" else max(len(starts), 1))
        # Sorted by layer, so that starts at the same layer share a sweep and no zeros pass the layers above it.
        order = sorted(range(len(starts)), key=lambda n: starts[n].window.value)
        chunks = [self._sweep([starts[n] for n in order[i : i + size]], until) for i in range(0, len(order), size)]
        if not chunks:
            return self.image.new_zeros(0, *self.image.shape[1:])
        gathered = torch.cat(chunks)
        return gathered[torch.tensor(order).argsort().to(gathered.device)]

    def losses(self, start: Start) -> tuple[tuple[float, float], tuple[Entry, ...]]:
        """How much of the positive and of the negative relevance of a start arrives at the pixels, and what keeps it.

        Returns:
            The two shares, 1 where there is no relevance of that sign, and the conservation report of the larger part.
        """
        parts = [replace(start, relevance=r) for r in (start.relevance.clamp(min=0), -start.relevance.clamp(max=0))]
        sums = [float(part.relevance.sum(dtype=torch.float64)) for part in parts]
        reports = [ConservationReport(), ConservationReport()]
        arrived = [self._sweep([p], 0, r).sum(dtype=torch.float64) for p, r in zip(parts, reports)]
        positive, negative = (float(a) / s if s > 0 else 1.0 for a, s in zip(arrived, sums))
        return (positive, negative), tuple(reports[int(sums[1] > sums[0])].entries)

    @property
    def head_nodes(self) -> list[Node]:
        """The convolutions of all heads, in the recorded graph."""
        return [*self._classes, *self._offsets]

    def _sweep(self, starts: list[Start], until: int, conservation: ConservationReport | None = None) -> Tensor:
        values = {start.window.value for start in starts}
        seeds = {value: self._seed(starts, value) for value in values}
        return backward(self.trace, seeds, until, conservation)

    def _seed(self, starts: list[Start], value: int) -> Tensor:
        node = next(n for n in self.head_nodes if n.inputs[0] == value)
        layer_input = self.trace.saved[node.index][0]
        channels, height, width = layer_input.shape[1:]
        seed = layer_input.new_zeros(len(starts), channels, height, width)
        for number, start in enumerate(starts):
            if start.window.value == value:
                # Written into the padded input and cropped, because the heads of one map may be padded differently.
                vertical, horizontal = start.window.padding
                padded = seed.new_zeros(channels, height + 2 * vertical, width + 2 * horizontal)
                padded[:, start.window.rows, start.window.columns] = start.relevance
                seed[number] = padded[:, vertical : vertical + height, horizontal : horizontal + width]
        return seed


def _read_logits(predictions: Predictions) -> Tensor:
    return predictions.rows


def _pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
