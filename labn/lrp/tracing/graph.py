"""The graph that relevance travels: recorded calls with their kinds, BatchNorms joined to the layer before them."""

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
    """One step of the network.

    Attributes:
        call: what was recorded; its `index` names the value that this node makes.
        kind: see `vocabulary.kind_of`; `region` for several nodes that are differentiated as one.
        inputs: indices of all values read.
        flow: the inputs that receive relevance (all of them, but for the gate of a product and what makes up weights).
        layer: weights, for kind `linear`.
        norm: the BatchNorm that follows, for kind `weighted` (that of a linear layer is the layer's).
        first: no linear layer lies between this node and the images (False for kind `weighted`).
        non_negative: the values this node makes are known to be >= 0.
        consumers: how many nodes read the value.
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
        """Index of the value this node makes."""
        return self.call.index

    @property
    def label(self) -> str:
        """Qualified module name, type and operation, as error messages and reports give them."""
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
        nodes: by index, in order; index 0, the images, is no node.
        logits: index of the logits.
        outputs: index of the value that a module (by qualified name) returned, where it is still there.
    """

    nodes: dict[int, Node]
    logits: int
    outputs: dict[str, int] = field(default_factory=dict)

    def reach(self, starts: set[int]) -> set[int]:
        """Indices of the values that relevance starting at `starts` can come to."""
        reached = set(starts)
        for index in sorted(self.nodes, reverse=True):
            if index in reached:
                reached.update(self.nodes[index].flow)
        return reached


def build(recording: Recording) -> Graph:
    """The graph of a recording: kinds, gates, merged BatchNorms, first layers and signs."""
    calls = {call.index: call for call in recording.calls}
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
        carried = _carried(call, nodes, calls)
        kind, flow = ("opaque", flow) if carried is None else (kind, (carried,))
    elif kind == "weighted" or call.operation in SHAPED_LIKE:
        flow = flow[:1]
    layer = layer_of(call) if kind == "linear" else None
    return Node(call, kind, call.inputs, flow, layer)


def _carried(call: Call, nodes: dict[int, Node], calls: dict[int, Call]) -> int | None:
    """Which factor of a product carries relevance; the other one is a gate, read as a constant.

    The gate is the factor that is broadcast (squeeze-excitation, attention maps), else the one that comes out of a
    bounded activation. None where neither tells.
    """
    factors = [arg.index for arg in call.args]
    if factors[0] == factors[1]:
        return None
    sizes = [calls[index].shape.numel() if index else call.shape.numel() for index in factors]
    if sizes[0] != sizes[1]:
        return factors[sizes.index(max(sizes))]
    bounded = [_is_bounded(index, nodes) for index in factors]
    return None if bounded[0] == bounded[1] else factors[bounded.index(False)]


def _is_bounded(index: int, nodes: dict[int, Node]) -> bool:
    while index in nodes and nodes[index].kind in ("identity", "route") and len(nodes[index].flow) == 1:
        index = nodes[index].flow[0]
    return index in nodes and nodes[index].call.operation in BOUNDED


def separate(nodes: dict[int, Node], logits: int) -> None:
    """Take apart every linear layer whose output is only ever cut along its channels: one layer per piece.

    Each piece (queries, keys, values) may then be joined to its own BatchNorm, and costs relevance no more than itself.
    """
    readers: dict[int, list[Node]] = defaultdict(list)
    for node in nodes.values():
        for source in node.inputs:
            readers[source].append(node)
    for node in [node for node in nodes.values() if node.kind == "linear"]:
        made = [node]
        while len(readers[made[-1].index]) == 1 and readers[made[-1].index][0].kind == "identity":
            made.append(readers[made[-1].index][0])
        pieces = _pieces(node, made[-1].index, readers[made[-1].index])
        if pieces and logits not in {one.index for one in made}:
            nodes.update(pieces)
            for one in made:
                del nodes[one.index]


def _pieces(node: Node, source: int, readers: list[Node]) -> dict[int, Node]:
    """The linear layers that make what `readers` cut out of the value `source`; empty if they do anything else."""
    assert node.layer is not None
    found = {}
    for reader in readers:
        rows = cut_of(reader.call, source, node.call.shape, node.layer.channel_axis) if reader.kind == "route" else None
        if rows is None or node.layer.options.get("groups", 1) != 1:
            return {}
        call = replace(node.call, index=reader.index, shape=reader.call.shape)
        found[reader.index] = replace(node, call=call, layer=node.layer.rows(rows))
    return found


def merge_norms(graph: Graph) -> None:
    """Join every BatchNorm to the linear or weighted step before it, where nothing else reads that step's output."""
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
    """Fill in which layers come first, which values cannot be negative, and how many nodes read each value."""
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
        return all(i in graph.nodes and graph.nodes[i].non_negative for i in node.inputs)
    return False


def use_fastest(graph: Graph, packs: bool) -> None:
    """Let the 2-D convolutions keep their prepared weights in channels-last order, or packed."""
    for node in graph.nodes.values():
        if node.layer is not None and node.layer.operation == "conv2d":
            node.layer.memory_format, node.layer.packs = torch.channels_last, packs
