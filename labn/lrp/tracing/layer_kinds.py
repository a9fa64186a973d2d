"""The kinds of a layer that rules by layer ask for, known from its weights and from what reads it."""

from __future__ import annotations

from labn.lrp.tracing.graph import Graph, Node

_COPIES = ("route", "identity", "pass", "norm")


def kinds_of(node: Node, graph: Graph) -> set[str]:
    """The kinds of a layer; see `labn.lrp.LayerRule`."""
    if node.layer is None:
        return {"product"}
    if node.layer.operation != "linear":
        groups = node.layer.options.get("groups", 1)
        return {"conv", "depthwise"} if groups > 1 and node.layer.weight.shape[1] == 1 else {"conv"}
    return {"linear", "attention"} if _reads_product(node, graph) or _feeds_product(node, graph) else {"linear"}


def _reads_product(node: Node, graph: Graph) -> bool:
    """Whether the input is a product of attention and values, perhaps rearranged."""
    source = graph.nodes.get(node.inputs[0])
    while source is not None and source.kind in _COPIES and len(source.flow) == 1:
        source = graph.nodes.get(source.flow[0])
    return source is not None and source.kind in ("weighted", "matmul")


def _feeds_product(node: Node, graph: Graph) -> bool:
    """Whether the output, perhaps rearranged, is a factor of a product."""
    reached = {node.index}
    for reader in graph.nodes.values():
        if reached.intersection(reader.inputs):
            if reader.kind in ("weighted", "matmul"):
                return True
            if reader.kind in _COPIES:
                reached.add(reader.index)
    return False
