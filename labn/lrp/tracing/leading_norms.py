"""BatchNorms without a linear layer before them, as in DenseNet and pre-activation ResNets, under `batchnorm="fold"`.

A BatchNorm y = g x + c that a linear layer reads directly is folded forward into that layer, w (g x + c) + b =
(w g) x + (w c + b). Padding of the layer would add zeros in place of c; there, and before anything else, such as a
ReLU, the BatchNorm becomes a layer of its own with the epsilon rule, R_x = g x R_y / (g x + c + e). So does the shift
of a BatchNorm that is written out as a product and a sum with constants (torchvision's FrozenBatchNorm2d).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from labn.lrp.rules.linear_layers import Norm
from labn.lrp.tracing.graph import Graph, Node
from labn.lrp.tracing.operations import SHIFT_OR_SCALE


def fold_leading_norms(graph: Graph, at_pixels: bool) -> Graph:
    """The same graph with every remaining BatchNorm folded forward, or as a node of kind `affine`.

    Args:
        graph: the recorded graph; not changed.
        at_pixels: treat a BatchNorm before the first linear layer as a layer too. The first-layer rules that do not
            divide by the pixels let its relevance pass: each of its outputs has one input, which gets all.
    """
    folded = replace(graph, nodes=dict(graph.nodes), outputs=dict(graph.outputs))
    for index, node in graph.nodes.items():
        if node.kind == "norm" and not _fold_forward(node, folded) and (at_pixels or not node.first):
            folded.nodes[index] = replace(node, kind="affine", norm=Norm.of(node.call))
        if node.kind == "pass" and (at_pixels or not node.first) and (norm := _written_out(node)) is not None:
            folded.nodes[index] = replace(node, kind="affine", norm=norm)
    return folded


def _written_out(node: Node) -> Norm | None:
    """Scale and shift (1, ...) of a constant that is added, as in a BatchNorm written out; None without a shift."""
    if node.call.operation not in SHIFT_OR_SCALE or len(node.inputs) != 1 or not node.call.constants:
        return None
    zeros = torch.zeros((1, *node.call.shape[1:])).to(node.call.constants[0])
    shift = node.evaluate({node.inputs[0]: zeros})
    if shift.shape != zeros.shape or not bool(shift.any()):
        return None  # a scaling hands relevance on as it is
    return Norm(node.evaluate({node.inputs[0]: zeros + 1}) - shift, shift)


def _fold_forward(node: Node, graph: Graph) -> bool:
    """Fold a BatchNorm into the linear layer that reads it; False where that is not exact."""
    path, reader = _path_from(node, graph)
    if reader is None or reader.layer is None or reader.layer.is_padded:
        return False
    channels = _channels_at(node, path, reader)
    if channels is None:
        return False
    norm = Norm.of(node.call)
    graph.nodes[reader.index] = replace(reader, layer=reader.layer.after(norm.scale[channels], norm.shift[channels]))
    before = graph.nodes.get(node.inputs[0])
    # The values on the path are now those before the BatchNorm, which is a module's output no longer.
    for link in (node, *path):
        kind = "identity" if link is node else link.kind
        graph.nodes[link.index] = replace(link, kind=kind, non_negative=before is not None and before.non_negative)
    joined = {link.index for link in (node, *path)}
    graph.outputs = {name: i for name, i in graph.outputs.items() if i not in joined}
    return True


def _path_from(node: Node, graph: Graph) -> tuple[list[Node], Node | None]:
    """The copying operations behind a node, each with a single reader, and the linear layer that they lead to."""
    path = [node]
    while path[-1].index != graph.logits:
        readers = [other for other in graph.nodes.values() if path[-1].index in other.inputs]
        if len(readers) != 1 or len(readers[0].inputs) != 1:
            break
        if readers[0].kind == "linear":
            return path[1:], readers[0]
        if readers[0].kind not in ("identity", "route"):
            break
        path.append(readers[0])
    return path[1:], None


def _channels_at(node: Node, path: list[Node], reader: Node) -> Tensor | None:
    """The BatchNorm's channel at every input channel of a layer; None where an input channel mixes several."""
    assert reader.layer is not None
    shape = node.call.shape
    # Channel numbers take the way of the values, so that every flattening and reordering is understood alike.
    values = {node.index: torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)).expand(shape)}
    for link in path:
        values[link.index] = link.evaluate(values)
    numbers = values[path[-1].index if path else node.index].movedim(reader.layer.channel_axis, 0).flatten(1)
    return numbers[:, 0] if bool((numbers == numbers[:, :1]).all()) else None
