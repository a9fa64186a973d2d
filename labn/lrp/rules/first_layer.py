"""The input of the first linear layer for an all-ones image, and for images of the lowest and the highest pixels.

The rules `ones`, `flat` and `wsquare` replace the pixels by 1. Padding, pooling or resizing before the first
convolution changes these ones: a padded border holds no pixel and gets no share, so that padding as a separate
operation gives the same relevance as padding inside the convolution. The pixel bounds of `zbox` are transformed like
the pixels, also by a normalisation inside the network. At a padded border both bounds equal the fill value, so its
contribution is zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from labn.lrp.tracing.graph import Graph, Node

# These operations hand relevance on unchanged and therefore do not change the shares of their inputs.
_UNCHANGED = {
    "norm", "relu", "identity", "pass", "rescale", "product", "activation", "activation_offset", "normalisation",
    "quotient",
}  # fmt: skip


class UnitActivation:
    """The values before the first linear layers for an all-ones image in place of the images; each is computed once.

    Args:
        graph: the graph of the network.
        images: (B, C, H, W), for shape, dtype and device.
    """

    def __init__(self, graph: Graph, images: Tensor) -> None:
        self.graph, self.images = graph, images
        self._computed: dict[int, Tensor | None] = {0: None}

    def at(self, index: int) -> Tensor | None:
        """The value `index` for an all-ones image, in its shape; None where that is all ones or not defined."""
        if index not in self._computed:
            node = self.graph.nodes.get(index)
            self._computed[index] = None if node is None else self._of(node)
        return self._computed[index]

    def filled(self, index: int) -> Tensor:
        """`at`, with a tensor of ones in place of None."""
        values = self.at(index)
        shape = self.graph.nodes[index].call.shape if index else self.images.shape
        return self.images.new_ones(shape) if values is None else values

    def _of(self, node: Node) -> Tensor | None:
        if node.kind in _UNCHANGED:
            return self.at(node.flow[0])
        evaluate = _EVALUATE.get(node.kind)
        # Copies and maxima of ones are ones.
        still_ones = node.kind in ("route", "maxpool", "maximum") and all(
            self.at(index) is None for index in node.inputs
        )
        if evaluate is None or still_ones:
            return None
        return evaluate(node, {index: self.filled(index) for index in node.inputs})


class PixelBounds:
    """Lower and upper bounds of the values before the first linear layers; each pair is computed once.

    A gate and an L2 norm depend on the image; they count as factors of at most 1, which leave the bounds valid.

    Args:
        graph: the graph of the network.
        images: (B, C, H, W), for their shape.
        low, high: bounds of the pixels, broadcastable to the images.
    """

    def __init__(self, graph: Graph, images: Tensor, low: Tensor, high: Tensor) -> None:
        self.graph = graph
        self._computed: dict[int, tuple[Tensor, Tensor] | None] = {0: (low.expand_as(images), high.expand_as(images))}

    def at(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Lower and upper bound of the value `index`, each in its shape; None above a linear layer."""
        if index not in self._computed:
            node = self.graph.nodes.get(index)
            self._computed[index] = None if node is None else self._of(node)
        return self._computed[index]

    def _of(self, node: Node) -> tuple[Tensor, Tensor] | None:
        # Valid for factors in [0, 1] if the bounds enclose 0, as normalised black and white do.
        if node.kind in ("rescale", "product", "quotient"):
            return self.at(node.flow[0])
        inputs = {index: self.at(index) for index in node.inputs} if node.kind in _MONOTONE else {}
        bounds = {index: pair for index, pair in inputs.items() if pair is not None}
        if not bounds or len(bounds) < len(inputs):
            return None
        of_low, of_high = (node.evaluate({index: pair[k] for index, pair in bounds.items()}) for k in (0, 1))
        return torch.minimum(of_low, of_high), torch.maximum(of_low, of_high)  # a negative factor swaps them


def covered(node: Node, values: dict[int, Tensor]) -> Tensor:
    """Where a copy with fills copies an input that carries relevance, bool in the output's shape."""
    # A copied value follows its input from 0 to 1, a filled one does not.
    ones, zeros = (
        {index: fill(value) if index in node.flow else value for index, value in values.items()}
        for fill in (torch.ones_like, torch.zeros_like)
    )
    return node.evaluate(ones) != node.evaluate(zeros)


def _padded(node: Node, units: dict[int, Tensor]) -> Tensor:
    return torch.where(covered(node, units), node.evaluate(units), 0.0)


_EVALUATE: dict[str, Callable[[Node, dict[int, Tensor]], Tensor]] = {
    **dict.fromkeys(("route", "maxpool", "spread"), Node.evaluate),
    "pad": _padded,
}

# Operations that are monotone in every single pixel, so that bounds of the inputs give bounds of the output.
_MONOTONE = {"norm", "relu", "identity", "pass", "sum", "route", "maxpool", "spread", "pad"}
