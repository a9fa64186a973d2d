"""The recorded graph of a model with its prepared weights, made once per image shape and state of the weights."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError, UnsupportedError
from labn.inference.deep_copy import deep_copy
from labn.inference.fingerprint import ModelCache
from labn.inference.model_traits import random_sentence, repeat_each_other
from labn.inference.modes import logits_of
from labn.inference.packing import can_pack
from labn.lrp.backward import BACKWARD
from labn.lrp.config import Config, SoftmaxName
from labn.lrp.forward import run_forward
from labn.lrp.rules.block import CLAMPABLE, PIECEWISE_LINEAR, carrying_in
from labn.lrp.rules.linear_layers import Layer
from labn.lrp.rules.residual_sums import ResidualSum, residual_sum_of
from labn.lrp.tracing.graph import Graph, build, moves_axes, use_fastest
from labn.lrp.tracing.leading_norms import fold_leading_norms
from labn.lrp.tracing.recorder import record
from labn.lrp.tracing.residual_blocks import with_regions

ReadLogits = Callable[[Any], Tensor]
"""The output of a model -> (B, K), the values that relevance starts from."""

KEPT_SHAPES = 4  # plans per model; each holds the graph of one image shape

ROUNDING = 10.0
"""Factor between the error of single precision in a model's own logits and the difference that a recording may show.

A recording adds up in another order, with BatchNorm folded and convolutions packed."""

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference between a recording's logits and the model's, relative to the largest logit."""


@dataclass
class Plan:
    """The graph of one model for one image shape.

    Attributes:
        graph: the recorded graph.
        residual_sums: node index -> residual sum.
    """

    graph: Graph
    residual_sums: dict[int, ResidualSum]
    _regions: dict[tuple[bool, bool], Graph] = field(default_factory=dict)
    _folded: dict[tuple[int, bool], Graph] = field(default_factory=dict)

    def for_config(self, config: Config) -> Graph:
        """The graph for the rules of sums and of BatchNorms of `config`."""
        graph = self._with_blocks(config) if config.residual == "block" else self.graph
        if not config.folded:
            return graph
        key = id(graph), config.first_layer in ("same", "epsilon")
        if key not in self._folded:
            self._folded[key] = fold_leading_norms(graph, key[1])
        return self._folded[key]

    def _with_blocks(self, config: Config) -> Graph:
        """The graph with residual blocks joined to regions.

        Consecutive blocks become one region, whose relevance is a single gradient, because the output that the lower
        block divides by cancels the input that the upper block multiplies with. With clamped weights these two differ,
        so that every block is then a region of its own.
        """
        options = config.block_weights == "signed", config.first_layer == "same"
        if options not in self._regions:
            self._regions[options] = with_regions(self.graph, *options)
        graph = self._regions[options]
        if self.residual_sums and not any(node.kind == "region" for node in graph.nodes.values()):
            warnings.warn(
                "residual='block' finds no residual block in this network that can be taken as one layer; "
                "its sums share their relevance as residual='ratio' does.",
                stacklevel=2,
            )
        return graph


@dataclass
class _Plans:
    """The plans of one model by image shape; they share the layers and with them the prepared weights."""

    by_shape: OrderedDict[tuple[object, ...], Plan] = field(default_factory=OrderedDict)
    layers: dict[tuple[object, ...], Layer] = field(default_factory=dict)


def plan_for(
    model: nn.Module, images: Tensor, read_logits: ReadLogits = logits_of, softmax: SoftmaxName = "constant"
) -> Plan:
    """The plan of `model` for images of this shape; weights that an earlier call prepared are used again.

    Args:
        model: in eval mode.
        images: (B, C, H, W), on which the model is recorded the first time.
        read_logits: see `ReadLogits`.
        softmax: see `labn.lrp.Config`.

    Raises:
        InputError: the recording does not repeat the model on other images.
    """
    plans = plans_of(model)
    key = (tuple(images.shape), images.dtype, images.device, read_logits, softmax)
    if key not in plans.by_shape:
        plan = _make(model, images, plans.layers, read_logits, softmax)
        # Once per state of the model: the check costs a forward of the model and one of the graph.
        if not plans.by_shape:
            _verify(model, plan, images, read_logits)
        plans.by_shape[key] = plan
    plans.by_shape.move_to_end(key)
    while len(plans.by_shape) > KEPT_SHAPES:
        plans.by_shape.popitem(last=False)
    return plans.by_shape[key]


_cache: ModelCache[_Plans] = ModelCache()


def plans_of(model: nn.Module) -> _Plans:
    """The plans of a model; empty again after the model has changed."""
    return _cache.get(model, "plans", _Plans)


def _make(
    model: nn.Module,
    images: Tensor,
    layers: dict[tuple[object, ...], Layer],
    read_logits: ReadLogits,
    softmax: SoftmaxName,
) -> Plan:
    constant = softmax == "constant"
    graph = build(record(model, images, read_logits), constant)
    if len(images) > 1 and graph.images_lead and moves_axes(graph):
        # With one image, an axis that only happens to be as long as the batch shows.
        single = build(record(model, images[:1], read_logits), constant)
        graph.images_lead, graph.copies_lead = single.images_lead, single.copies_lead
    for node in graph.nodes.values():
        if node.layer is not None:
            # One `Layer` per weight: graphs of other image shapes share its prepared weights.
            node.layer = layers.setdefault(_identity_of(node.layer), node.layer)
    if images.device.type == "cpu":
        use_fastest(graph, can_pack(images, images.dtype))
    residual_sums = {
        i: residual_sum_of(n, graph)
        for i, n in graph.nodes.items()
        if n.kind in ("sum", "difference") and len(n.inputs) == 2
    }
    return Plan(graph, residual_sums)


def _identity_of(layer: Layer) -> tuple[object, ...]:
    norm = None if layer.norm is None else layer.norm.source
    # Two layers may share a weight and have biases of their own, or read it in another order, as its transpose.
    tensors = [None if t is None else (t.data_ptr(), t.shape, t.stride()) for t in (layer.weight, layer.bias)]
    return (layer.operation, *tensors, str(layer.options), norm)


def check(graph: Graph, config: Config, starts: set[int]) -> None:
    """Check that every layer which relevance passes has a rule.

    Args:
        graph: the graph that relevance passes.
        config: the rules.
        starts: indices of the values at which relevance starts.

    Raises:
        UnsupportedError: the message names the layer without a rule that is nearest to the logits, or says that
            relevance ends before the images.
    """
    reached = graph.reach(starts)
    allowed = CLAMPABLE if config.block_weights == "zplus" else PIECEWISE_LINEAR
    for node in sorted((n for i, n in graph.nodes.items() if i in reached), key=lambda n: -n.index):
        carrying = carrying_in(node)
        bad = [n for n in node.inner if n.index in carrying and n.kind not in allowed]
        if node.kind not in BACKWARD or bad:
            raise UnsupportedError(
                f"Relevance propagation has no rule for {(bad or [node])[0].label}"
                f"{' with block_weights=' + repr(config.block_weights) if bad and config.residual == 'block' else ''}; "
                "replace it by a layer with one (see the table of operations in labn/lrp/README.md)."
            )
    if 0 not in reached:
        last = graph.nodes[min(reached)]
        raise UnsupportedError(
            f"Relevance ends at {last.label}, whose result counts as a constant; softmax='attnlrp' hands relevance on."
        )


def _verify(model: nn.Module, plan: Plan, images: Tensor, read_logits: ReadLogits) -> None:
    """Check that the recording, run on other images, gives the model's own logits where these are finite.

    The other images stay within the range of the given ones: products of two values that grow with the image, as in
    lambda layers, may overflow otherwise.
    """
    others = images.flip(-1) * 0.5 + images.roll(1, -2) * 0.25
    with torch.no_grad():
        # A copy: the model may write on its input.
        expected = read_logits(model(others.clone()))
        logits = run_forward(plan.graph, plan.residual_sums, Config(residual="duplicate"), others).logits
    if _agree(logits, expected, TOLERANCES[images.dtype]):
        return
    with torch.no_grad():
        again = read_logits(model(others.clone()))
        if not repeat_each_other(expected, again):
            raise InputError(f"{random_sentence(model)} Relevance cannot be propagated through it.")
        if images.dtype == torch.float32 and _agree(logits, expected, ROUNDING * _rounding(model, others, read_logits)):
            return
    raise InputError(
        f"The recording of {type(model).__name__} does not repeat its logits on other images: the forward pass "
        "branches on pixel values, or leaves torch functions (NumPy, custom autograd functions)."
    )


def _agree(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits are equal to a share of the largest one, where the expected ones are finite."""
    finite = expected.isfinite()
    logits, expected = logits[finite], expected[finite]
    # 1e-6 for a network whose logits are all zero.
    scale = torch.cat([expected.abs().flatten(), expected.new_tensor([1e-6])]).max()
    return torch.allclose(logits / scale, expected / scale, atol=tolerance, rtol=0)


def _rounding(model: nn.Module, images: Tensor, read_logits: ReadLogits) -> float:
    """The error that single precision alone makes in the model's own logits, relative to the largest one."""
    single = read_logits(model(images.clone())).double()
    double = read_logits(deep_copy(model).double()(images.double()))
    finite = double.isfinite() & single.isfinite()
    error = (single - double)[finite].abs().max() / double[finite].abs().max().clamp(min=1e-6)
    return float(error)
