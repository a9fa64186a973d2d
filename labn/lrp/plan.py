"""From a model to a graph that is ready to run, made once per model, image shape and state of the weights."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from labn.errors import InputError, UnsupportedError
from labn.inference.fingerprint import structure_key, version_of
from labn.inference.modes import logits_of
from labn.inference.packing import can_pack
from labn.lrp.backward import BACKWARD
from labn.lrp.config import Config
from labn.lrp.forward import run_forward
from labn.lrp.rules.block import PIECEWISE_LINEAR, carrying_in
from labn.lrp.rules.linear_layers import Layer
from labn.lrp.rules.residual_sums import ResidualSum, residual_sum_of
from labn.lrp.tracing.graph import Graph, build, use_fastest
from labn.lrp.tracing.recorder import record
from labn.lrp.tracing.residual_blocks import with_regions

Rows = Callable[[Any], Tensor]
"""What a model returns -> (B, K), the values that relevance starts from."""
KEPT_SHAPES = 4
SAME = {torch.float64: 1e-8, torch.float32: 1e-3}  # how exactly a recording must repeat the model


@dataclass
class Plan:
    """The graph of one model for one image shape.

    Attributes:
        graph: as recorded.
        residual_sums: the residual sums by index.
    """

    graph: Graph
    residual_sums: dict[int, ResidualSum]
    _regions: dict[tuple[bool, bool], Graph] = field(default_factory=dict)

    def for_config(self, config: Config) -> Graph:
        """The graph that the residual rule of `config` runs on: under `block` with blocks as regions (see `blocks`).

        With clamped weights what a block makes is not what the next one is given, so that the two do not cancel and a
        row is no single gradient: every block is a region of its own.
        """
        if config.residual != "block":
            return self.graph
        how = config.block_weights == "signed", config.first_layer == "same"
        if how not in self._regions:
            self._regions[how] = with_regions(self.graph, *how)
        if self.residual_sums and not any(node.kind == "region" for node in self._regions[how].nodes.values()):
            warnings.warn(
                "residual='block' finds no residual block in this network that can be taken as one layer; "
                "its sums share their relevance as residual='ratio' does.",
                stacklevel=2,
            )
        return self._regions[how]


@dataclass
class _Store:
    state: tuple[object, ...]
    plans: OrderedDict[tuple[object, ...], Plan] = field(default_factory=OrderedDict)
    layers: dict[tuple[object, ...], Layer] = field(default_factory=dict)


# A memo, not state: what it holds follows from the model alone, and goes when the model goes.
_stores: WeakKeyDictionary[nn.Module, _Store] = WeakKeyDictionary()


def plan_for(model: nn.Module, images: Tensor, rows: Rows = logits_of) -> Plan:
    """The plan of `model` for images of this shape; weights prepared for an earlier call are used again.

    Whether the model is still the same is seen from its modules (`structure_key`), and from address, version
    counter, first and last value of every parameter and buffer (edits through `.data` leave no trace in the counter).
    """
    state = _state_of(model)
    store = _stores.get(model)
    if store is None or store.state != state:
        store = _stores[model] = _Store(state)
    key = (tuple(images.shape), images.dtype, images.device, rows)
    if key not in store.plans:
        plan = _make(model, images, store.layers, rows)
        if not store.plans:
            _verify(model, plan, images, rows)
        store.plans[key] = plan
    store.plans.move_to_end(key)
    while len(store.plans) > KEPT_SHAPES:
        store.plans.popitem(last=False)
    return store.plans[key]


def _state_of(model: nn.Module) -> tuple[object, ...]:
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    addresses = tuple((t.data_ptr(), version_of(t)) for t in tensors)
    ends = [t.as_strided((2,), (_last(t),)).double() for t in tensors if t.is_floating_point() and t.numel()]
    samples = tuple(torch.cat(ends).tolist()) if ends else ()
    return structure_key(model), addresses, samples


def _last(tensor: Tensor) -> int:
    """Distance in memory from a tensor's first to its last value."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _make(model: nn.Module, images: Tensor, layers: dict[tuple[object, ...], Layer], rows: Rows) -> Plan:
    graph = build(record(model, images, rows))
    for node in graph.nodes.values():
        if node.layer is not None:
            node.layer = layers.setdefault(_identity_of(node.layer), node.layer)
    if images.device.type == "cpu":
        use_fastest(graph, can_pack(images, images.dtype))
    residual_sums = {
        i: residual_sum_of(n, graph) for i, n in graph.nodes.items() if n.kind == "sum" and len(n.inputs) == 2
    }
    return Plan(graph, residual_sums)


def _identity_of(layer: Layer) -> tuple[object, ...]:
    norm = None if layer.norm is None else layer.norm.source
    return (layer.operation, layer.weight.data_ptr(), layer.weight.shape, str(layer.options), norm)


def check(graph: Graph, config: Config, starts: set[int]) -> None:
    """Raise NotImplementedError naming the first layer on the way of relevance that has no rule."""
    reached = graph.reach(starts)
    for node in sorted((n for i, n in graph.nodes.items() if i in reached), key=lambda n: -n.index):
        carrying = carrying_in(node)
        bad = [n for n in node.inner if n.index in carrying and n.kind not in PIECEWISE_LINEAR]
        if node.kind not in BACKWARD or bad:
            raise UnsupportedError(
                f"Relevance propagation has no rule for {(bad or [node])[0].label}; "
                "replace it by a layer with one (convolution, linear, BatchNorm, ReLU, pooling, sums, gates)."
            )


def _verify(model: nn.Module, plan: Plan, images: Tensor, rows: Rows) -> None:
    """Raise ValueError unless the recording, run on other images, gives the model's own logits where these are finite.

    The images stay within the values seen, as products of what an image makes (lambda layers) may square to infinity.
    """
    others = images.flip(-1) * 0.5 + images.roll(1, -2) * 0.25
    with torch.no_grad():
        expected = rows(model(others))
        got = run_forward(plan.graph, plan.residual_sums, Config(residual="duplicate"), others).logits
    known = expected.isfinite()
    got, expected = got[known], expected[known]
    scale = torch.cat([expected.abs().flatten(), expected.new_tensor([1e-6])]).max()
    if not torch.allclose(got / scale, expected / scale, atol=SAME[images.dtype], rtol=0):
        raise InputError(
            f"{type(model).__name__} does not repeat on other images what was recorded on one batch: its forward pass "
            "branches on pixel values or leaves torch functions (NumPy, custom autograd functions)."
        )
