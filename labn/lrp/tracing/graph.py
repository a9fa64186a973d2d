"""The graph that relevance passes: recorded calls by kind, with BatchNorms joined to the layer before them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from labn.lrp.rules.linear_layers import Layer, Norm, layer_of
from labn.lrp.tracing.operations import BOUNDED, CANONICAL, NON_NEGATIVE, SHAPED_LIKE, cut_of, kind_of
from labn.lrp.tracing.recorder import Call, Recording


@dataclass
class Node:
    """One operation of the network.

    Attributes:
        call: the recorded call; its `index` identifies the value that this node computes.
        kind: see `labn.lrp.tracing.operations.kind_of`; `region` for several nodes that are differentiated as one.
        inputs: indices of all values that the node reads.
        flow: the inputs that receive relevance: all except the gate of a product and the constants of weights.
        layer: weights and options, for kind `linear`.
        norm: the BatchNorm that follows, for kind `weighted`, or the node itself, for kind `affine` (see
            `labn.lrp.tracing.leading_norms`); that of a linear layer is part of `layer`.
        first: whether no linear layer lies between the images and this node (False for kind `weighted`).
        non_negative: whether the value of this node is known to be >= 0.
        consumers: number of nodes that read the value.
        inner: the nodes of a region, in order.
    """

    call: Call
    kind: str
    inputs: tuple[int, ...]
    flow: tuple[int, ...]
    layer: Layer | None = None
    norm: Norm | None = None
    first: bool = False
    non_negative: bool = False
    consumers: int = 0
    inner: tuple[Node, ...] = ()

    @property
    def index(self) -> int:
        """Index of the value that this node computes."""
        return self.call.index

    @property
    def label(self) -> str:
        """Qualified module name, type and operation, for error messages and reports."""
        module = f"'{self.call.module}'" if self.call.module else "the model itself"
        return f"{module} ({self.call.module_type or 'top level'}, {self.call.operation})"

    def evaluate(self, values: dict[int, Tensor]) -> Tensor:
        """Run the recorded operation in its out-of-place form."""
        if self.kind == "identity":
            return values[self.inputs[0]]
        canonical = CANONICAL.get(self.call.operation)
        if canonical is None or self.kind == "opaque":
            return self.call.evaluate(values)
        kwargs = self.call.kwargs if self.kind == "route" else {}  # `size` of a view stays, `inplace` of a ReLU goes
        return replace(self.call, func=canonical, kwargs=kwargs).evaluate(values)


@dataclass
class Graph:
    """Nodes in the order of computation, pruned to what the logits need.

    Attributes:
        nodes: index -> node, in order; the images have index 0 and no node.
        logits: index of the logits.
        outputs: qualified module name -> index of the value that the module returned, where the graph still has it.
    """

    nodes: dict[int, Node]
    logits: int
    outputs: dict[str, int] = field(default_factory=dict)

    def reach(self, starts: set[int]) -> set[int]:
        """Indices of the values that relevance from `starts` can reach, `starts` included."""
        reached = set(starts)
        for index in sorted(self.nodes, reverse=True):
            if index in reached:
                reached.update(self.nodes[index].flow)
        return reached


def build(recording: Recording) -> Graph:
    """The graph of a recording, with kinds, gates, joined BatchNorms, first layers and known signs."""
    calls = {call.index: call for call in recording.calls}
    # Backwards from the logits: calls that they do not depend on are dropped.
    needed = {recording.logits}
    for index in sorted(calls, reverse=True):
        if index in needed:
            needed.update(calls[index].inputs)
    nodes: dict[int, Node] = {}
    for index in sorted(needed - {0}):
        nodes[index] = _node(calls[index], nodes, calls)
    separate(nodes, recording.logits)
    graph = Graph(nodes, recording.logits, {name: i for name, i in recording.outputs.items() if i in nodes})
    merge_norms(graph)
    annotate(graph)
    return graph


def _node(call: Call, nodes: dict[int, Node], calls: dict[int, Call]) -> Node:
    kind = kind_of(call)
    flow = call.inputs
    if kind == "product":
        factor = _carrying_factor(call, nodes, calls)
        kind, flow = ("opaque", flow) if factor is None else (kind, (factor,))
    elif kind == "weighted" or call.operation in SHAPED_LIKE:
        flow = flow[:1]
    layer = layer_of(call) if kind == "linear" else None
    return Node(call, kind, call.inputs, flow, layer)


def _carrying_factor(call: Call, nodes: dict[int, Node], calls: dict[int, Call]) -> int | None:
    """Index of the factor of a product that carries relevance; the other factor is a gate and counts as a constant.

    The gate is the factor that is broadcast (squeeze-excitation, attention maps), or else the one that comes from a
    bounded activation. None where neither criterion decides.
    """
    factors = [arg.index for arg in call.args]
    if factors[0] == factors[1]:  # a square: neither factor is a constant
        return None
    # The broadcast factor is the one with fewer values.
    sizes = [calls[index].shape.numel() if index else call.shape.numel() for index in factors]
    if sizes[0] != sizes[1]:
        return factors[sizes.index(max(sizes))]
    bounded = [_is_bounded(index, nodes) for index in factors]
    return None if bounded[0] == bounded[1] else factors[bounded.index(False)]


def _is_bounded(index: int, nodes: dict[int, Node]) -> bool:
    # Look through reshapes of the activation's output.
    while index in nodes and nodes[index].kind in ("identity", "route") and len(nodes[index].flow) == 1:
        index = nodes[index].flow[0]
    return index in nodes and nodes[index].call.operation in BOUNDED


def separate(nodes: dict[int, Node], logits: int) -> None:
    """Replace every linear layer whose output is only split along its channels by one layer per piece.

    Each piece (queries, keys, values) can then be joined to its own BatchNorm, and relevance for one piece does not
    pass the weights of the others.
    """
    readers: dict[int, list[Node]] = defaultdict(list)
    for node in nodes.values():
        for source in node.inputs:
            readers[source].append(node)
    for node in [node for node in nodes.values() if node.kind == "linear"]:
        chain = [node]  # the layer and identities behind it, such as `contiguous`
        while len(readers[chain[-1].index]) == 1 and readers[chain[-1].index][0].kind == "identity":
            chain.append(readers[chain[-1].index][0])
        pieces = _pieces(node, chain[-1].index, readers[chain[-1].index])
        if pieces and logits not in {link.index for link in chain}:
            nodes.update(pieces)
            for link in chain:
                del nodes[link.index]


def _pieces(node: Node, source: int, readers: list[Node]) -> dict[int, Node]:
    """One linear layer per reader for the channels it cuts out of `source`; empty if one does anything else."""
    assert node.layer is not None
    pieces = {}
    for reader in readers:
        channels = (
            cut_of(reader.call, source, node.call.shape, node.layer.channel_axis) if reader.kind == "route" else None
        )
        if channels is None or node.layer.options.get("groups", 1) != 1:
            return {}
        call = replace(node.call, index=reader.index, shape=reader.call.shape)
        pieces[reader.index] = replace(node, call=call, layer=node.layer.for_outputs(channels))
    return pieces


def merge_norms(graph: Graph) -> None:
    """Join every BatchNorm to the linear or weighted node before it, where no other node reads that node's output."""
    readers = Counter(index for node in graph.nodes.values() for index in node.inputs)
    for index, node in list(graph.nodes.items()):
        before = graph.nodes.get(node.inputs[0]) if node.kind == "norm" else None
        if before is None or before.kind not in ("linear", "weighted") or readers[before.index] != 1:
            continue
        call, norm = replace(before.call, index=index), Norm.of(node.call)
        if before.layer is None:
            graph.nodes[index] = replace(before, call=call, norm=norm)
        else:
            graph.nodes[index] = replace(before, call=call, layer=replace(before.layer, norm=norm))
        del graph.nodes[before.index]
        graph.outputs = {name: index if i == before.index else i for name, i in graph.outputs.items()}


def annotate(graph: Graph) -> None:
    """Set `first`, `non_negative` and `consumers` of every node."""
    readers = Counter(index for node in graph.nodes.values() for index in node.inputs)
    behind_linear: set[int] = set()
    for index, node in graph.nodes.items():
        node.consumers = readers[index] + (index == graph.logits)
        node.first = node.kind != "weighted" and not behind_linear.intersection(node.flow)
        if node.kind in ("linear", "weighted") or any(i in behind_linear for i in node.flow):
            behind_linear.add(index)
        node.non_negative = _is_non_negative(node, graph)


def _is_non_negative(node: Node, graph: Graph) -> bool:
    if node.call.operation in NON_NEGATIVE:
        return True
    if node.kind == "pad" and (node.call.kwargs.get("value") or 0) < 0:
        return False
    if node.kind in ("identity", "route", "pad", "maxpool", "spread", "sum", "product"):
        # A concatenation may hold constants too, whose sign is read off them.
        known = all(bool((constant >= 0).all()) for constant in node.call.constants)
        return known and all(i in graph.nodes and graph.nodes[i].non_negative for i in node.inputs)
    return False


def use_fastest(graph: Graph, packs: bool) -> None:
    """Make 2-D convolutions keep their prepared weights in channels-last order and, with `packs`, packed."""
    for node in graph.nodes.values():
        if node.layer is not None and node.layer.operation == "conv2d":
            node.layer.memory_format, node.layer.packs = torch.channels_last, packs
