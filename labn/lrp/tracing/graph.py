"""The graph that relevance passes: recorded calls by kind, with BatchNorms joined to the layer before them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from labn.lrp.rules.linear_layers import Layer, Norm, layer_of
from labn.lrp.tracing.operations import (
    BOUNDED,
    CANONICAL,
    FILL,
    MOVES_AXES,
    NON_NEGATIVE,
    RISING,
    SHAPED_LIKE,
    cut_of,
    kind_of,
    never_negative,
)
from labn.lrp.tracing.recorder import Call, Recording, Ref
from labn.lrp.tracing.weights_of_calls import as_weighted, factors_of


@dataclass
class Node:
    """One operation of the network.

    Attributes:
        call: the recorded call; its `index` identifies the value that this node computes.
        kind: see `labn.lrp.tracing.operations.kind_of`; `region` for several nodes that are differentiated as one.
        inputs: indices of all values that the node reads.
        flow: the inputs that receive relevance: all except the gate of a product, the constants of weights, masks,
            indices, and what counts as a constant, such as attention.
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
    def fills(self) -> bool:
        """Whether some values of a copy may have no source that carries relevance: constants, masks, a class token."""
        return bool(self.call.constants) or self.call.operation in FILL or len(self.flow) < len(self.inputs)

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
        if canonical is None or self.kind in ("opaque", "maximum"):
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
        images_lead: whether the leading axis of every computed value that relevance passes counts the images, which
            windowed attention and layers that read (tokens, images, features) change.
        copies_lead: the same of the copies in between, such as queries, keys and values along a leading axis.
    """

    nodes: dict[int, Node]
    logits: int
    outputs: dict[str, int] = field(default_factory=dict)
    images_lead: bool = True
    copies_lead: bool = True

    def reach(self, starts: set[int]) -> set[int]:
        """Indices of the values that relevance from `starts` can reach, `starts` included."""
        reached = set(starts)
        for index in sorted(self.nodes, reverse=True):
            if index in reached:
                reached.update(self.nodes[index].flow)
        return reached


def build(recording: Recording, attention_is_constant: bool = True) -> Graph:
    """The graph of a recording, with kinds, gates, joined BatchNorms, first layers and known signs.

    Args:
        recording: the recorded calls.
        attention_is_constant: a softmax counts as a constant, so that relevance goes to the values alone.
    """
    calls = {call.index: call for call in recording.calls}
    # Backwards from the logits: calls that they do not depend on are dropped.
    needed = {recording.logits}
    for index in sorted(calls, reverse=True):
        if index in needed:
            needed.update(calls[index].inputs)
    builder = _Builder(calls, attention_is_constant)
    for index in sorted(needed - {0}):
        builder.add(calls[index])
    nodes = builder.nodes
    separate(nodes, recording.logits)
    graph = Graph(nodes, recording.logits, {name: i for name, i in recording.outputs.items() if i in nodes})
    merge_norms(graph)
    annotate(graph)
    _find_images(graph, recording.count)
    return graph


def _find_images(graph: Graph, count: int) -> None:
    """Set `images_lead` and `copies_lead` of the graph of a recording of `count` images."""
    for index in graph.reach({graph.logits}) - {0}:
        node = graph.nodes[index]
        if node.call.shape[:1] != (count,):
            graph.copies_lead = False
            graph.images_lead &= node.kind in ("route", "identity") and not node.fills


def moves_axes(graph: Graph) -> bool:
    """Whether relevance passes an operation that may exchange the axis of the images with one of equal length."""
    return any(graph.nodes[i].call.operation in MOVES_AXES for i in graph.reach({graph.logits}) - {0})


class _Builder:
    """Makes the nodes of a graph in the order of computation.

    Args:
        calls: the recorded calls by index.
        attention_is_constant: see `build`.

    Attributes:
        nodes: the nodes so far.
        constant: indices of values that are computed from attention alone; they count as constants.
        queries: indices of values that a product has met as the queries of values which attention has collected.
    """

    def __init__(self, calls: dict[int, Call], attention_is_constant: bool) -> None:
        self.calls, self.attention_is_constant = calls, attention_is_constant
        self.nodes: dict[int, Node] = {}
        self.constant: set[int] = set()
        self.queries: set[int] = set()

    def add(self, call: Call) -> None:
        """Append the node of a call."""
        node = self._node(call)
        self.nodes[call.index] = node
        stops = node.kind == "softmax" and self.attention_is_constant
        if stops or all(index in self.constant for index in node.inputs):
            self.constant.add(call.index)
            # An opaque call keeps its flow: relevance must not end there silently.
            node.flow = node.flow if node.kind == "opaque" else ()

    def _node(self, call: Call) -> Node:
        kind, flow = kind_of(call), call.inputs
        if kind == "product":
            flow = self._factors(call)
        elif kind == "matmul":
            return self._matmul(call)
        elif kind in ("weighted", "quotient") or call.operation in SHAPED_LIKE:
            flow = flow[:1]
        flow = self._varying(flow)
        if kind in ("sum", "difference") and len(flow) < len(call.inputs):
            kind = "pass"  # a shift by what counts as a constant
        layer = layer_of(call) if kind == "linear" else None
        return Node(call, kind, call.inputs, flow, layer)

    def _varying(self, flow: tuple[int, ...]) -> tuple[int, ...]:
        """The indices of floating values that do not count as constants; all, if all of them count as constants."""
        floating = tuple(i for i in flow if i == 0 or self.calls[i].floating)
        return tuple(i for i in floating if i not in self.constant) or floating

    def _factors(self, call: Call) -> tuple[int, ...]:
        """The factors of a product that carry relevance: one beside a gate, which counts as a constant, or both."""
        factor = _carrying_factor(call, self.nodes, self.calls)
        return call.inputs if factor is None else (factor,)

    def _matmul(self, call: Call) -> Node:
        """A matrix product: weights from attention or from queries count as constants, and relevance goes to the rest.

        A factor that attention has collected from values holds values itself, as the content lambda of a lambda layer
        does. The other factor then is a query, here and in every further product.
        """
        flow = self._varying(call.inputs)
        if len(flow) == 2:
            collected = [self._is_collected(index) for index in flow]
            if self.attention_is_constant and collected[0] != collected[1]:
                self.queries.add(self._origin(flow[collected.index(False)]))
            asking = [self._origin(index) in self.queries for index in flow]
            if asking[0] != asking[1]:
                flow = (flow[asking.index(False)],)
        factors = [f.index for f in factors_of(call) if isinstance(f, Ref)]
        if len(flow) == 1 and factors.count(flow[0]) == 1:
            weighted_call = as_weighted(call, flow[0])
            return Node(weighted_call, "weighted", weighted_call.inputs, flow)
        return Node(call, "matmul", call.inputs, flow)

    def _origin(self, index: int) -> int:
        """The value that `index` rearranges."""
        while index in self.nodes and self.nodes[index].kind in ("identity", "route", "norm", "pass"):
            if len(self.nodes[index].flow) != 1:
                break
            index = self.nodes[index].flow[0]
        return index

    def _is_collected(self, index: int) -> bool:
        """Whether a value is a rearranged product of attention and values."""
        node = self.nodes.get(self._origin(index))
        return node is not None and node.kind == "weighted" and any(i in self.constant for i in node.inputs)


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
    if sizes[0] != sizes[1] and max(sizes) == call.shape.numel():
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
            graph.nodes[index] = replace(before, call=call, norm=norm.after(before.norm))
        else:
            layer = replace(before.layer, norm=norm.after(before.layer.norm))
            graph.nodes[index] = replace(before, call=call, layer=layer)
        del graph.nodes[before.index]
        graph.outputs = {name: index if i == before.index else i for name, i in graph.outputs.items()}


def annotate(graph: Graph) -> None:
    """Set `first`, `non_negative` and `consumers` of every node."""
    readers = Counter(index for node in graph.nodes.values() for index in node.inputs)
    behind_linear: set[int] = set()
    for index, node in graph.nodes.items():
        node.consumers = readers[index] + (index == graph.logits)
        node.first = node.kind not in ("weighted", "matmul") and not behind_linear.intersection(node.flow)
        if node.kind in ("linear", "weighted", "matmul") or any(i in behind_linear for i in node.flow):
            behind_linear.add(index)
        node.non_negative = _is_non_negative(node, graph)


def _is_non_negative(node: Node, graph: Graph) -> bool:
    if node.call.operation in NON_NEGATIVE or never_negative(node.call):
        return True
    if node.call.operation in FILL:
        return False  # what is filled in may have any sign
    if node.kind == "pad" and (node.call.kwargs.get("value") or 0) < 0:
        return False
    keeps = node.kind == "activation" and node.call.operation in RISING
    if keeps or node.kind in ("identity", "route", "pad", "maxpool", "spread", "sum", "product", "maximum", "quotient"):
        # A concatenation may hold constants too, whose sign is read off them.
        known = all(bool((constant >= 0).all()) for constant in node.call.constants)
        return known and all(i in graph.nodes and graph.nodes[i].non_negative for i in node.inputs)
    return False


def use_fastest(graph: Graph, packs: bool) -> None:
    """Make 2-D convolutions keep their prepared weights in channels-last order and, with `packs`, packed."""
    for node in graph.nodes.values():
        if node.layer is not None and node.layer.operation == "conv2d":
            node.layer.memory_format, node.layer.packs = torch.channels_last, packs
