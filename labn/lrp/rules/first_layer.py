"""What an image of ones is where the first linear layer gets it: the activation of rules that ignore the pixels.

The rules `ones`, `flat` and `w2` replace the pixels by 1. Where padding, pooling or resizing comes before the first
convolution, what it makes of ones takes the place of the activation instead: a padded border has no pixel and gets no
share, so that padding outside of a convolution is the same as padding inside. The pixel bounds of `zb` go the way of
the pixels themselves, through a normalisation inside of the network too; at a border both are what it is filled with,
which leaves it nothing to contribute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from labn.lrp.tracing.graph import Graph, Node

# Relevance passes these as it is, so the shares below them do not change.
_UNCHANGED = {"norm", "relu", "identity", "pass", "rescale", "product"}


class UnitActivation:
    """What every value that has no linear layer below is made of, for images (B, C, H, W); each is made once.

    Args:
        graph: of the network.
        images: for their shape.
    """

    def __init__(self, graph: Graph, images: Tensor) -> None:
        self.graph, self.images = graph, images
        self._known: dict[int, Tensor | None] = {0: None}

    def at(self, index: int) -> Tensor | None:
        """What the value `index` is for such an image, in its shape; None where that is one everywhere."""
        if index not in self._known:
            node = self.graph.nodes.get(index)
            self._known[index] = None if node is None else self._of(node)
        return self._known[index]

    def filled(self, index: int) -> Tensor:
        """`at`, ones written out."""
        known = self.at(index)
        shape = self.graph.nodes[index].call.shape if index else self.images.shape
        return self.images.new_ones(shape) if known is None else known

    def _of(self, node: Node) -> Tensor | None:
        if node.kind in _UNCHANGED:
            return self.at(node.flow[0])
        made = _MADE.get(node.kind)
        plain = node.kind in ("route", "maxpool") and all(self.at(index) is None for index in node.inputs)
        return None if made is None or plain else made(node, {index: self.filled(index) for index in node.inputs})


class PixelBounds:
    """Between which values every value lies that has no linear layer below, for images (B, C, H, W); made once each.

    A gate and an L2 norm, which depend on the image, are read as factors of at most 1: the bounds stay as they are.

    Args:
        graph: of the network.
        images: for their shape.
        low, high: of the pixels, broadcastable to the images.
    """

    def __init__(self, graph: Graph, images: Tensor, low: Tensor, high: Tensor) -> None:
        self.graph = graph
        self._known: dict[int, tuple[Tensor, Tensor] | None] = {0: (low.expand_as(images), high.expand_as(images))}

    def at(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Lower and upper bound of the value `index`, each in its shape; None where it has a linear layer below."""
        if index not in self._known:
            node = self.graph.nodes.get(index)
            self._known[index] = None if node is None else self._of(node)
        return self._known[index]

    def _of(self, node: Node) -> tuple[Tensor, Tensor] | None:
        if node.kind in ("rescale", "product"):
            return self.at(node.flow[0])
        read = {index: self.at(index) for index in node.inputs} if node.kind in _MONOTONE else {}
        known = {index: ends for index, ends in read.items() if ends is not None}
        if not known or len(known) < len(read):
            return None
        one, other = (node.evaluate({index: ends[k] for index, ends in known.items()}) for k in (0, 1))
        return torch.minimum(one, other), torch.maximum(one, other)  # a negative factor swaps them


def covered(node: Node, values: dict[int, Tensor]) -> Tensor:
    """Where the output of a `pad` node copies some input, bool in the output's shape; elsewhere it is filled in."""
    ones, zeros = (
        {index: fill(value) for index, value in values.items()} for fill in (torch.ones_like, torch.zeros_like)
    )
    return node.evaluate(ones) != node.evaluate(zeros)


def _padded(node: Node, units: dict[int, Tensor]) -> Tensor:
    return torch.where(covered(node, units), node.evaluate(units), 0.0)


_MADE: dict[str, Callable[[Node, dict[int, Tensor]], Tensor]] = {
    **dict.fromkeys(("route", "maxpool", "spread"), Node.evaluate),
    "pad": _padded,
}

# Rising or falling in every single pixel.
_MONOTONE = {"norm", "relu", "identity", "pass", "sum", "route", "maxpool", "spread", "pad"}
