"""The forward pass of a propagation: BatchNorm folded where the rules allow, and only what they need kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from labn.lrp.config import Config
from labn.lrp.rules.block import RegionRun, evaluate_region, run_clamped, run_region
from labn.lrp.rules.elementary import USES_OUTPUT
from labn.lrp.rules.first_layer import PixelBounds, UnitActivation
from labn.lrp.rules.residual_sums import SHARES, ResidualSum
from labn.lrp.rules.weighted_layer import weighted_layer_of
from labn.lrp.tracing.graph import Graph, Node
from labn.lrp.weight_transforms import Identity, WeightTransform


@dataclass
class ForwardTrace:
    """A forward pass and what it kept for going back.

    Attributes:
        graph, residual_sums, config: what was run and how.
        logits: (B, K).
        kept: by node index, what the backward step of its kind needs.
        units: by node index, what a first linear layer has in place of an image of ones (see `units`); absent: ones.
        bounds: by node index, what it has in place of the lowest and highest pixels, where its rule is `zbox`.
        denominators: by node index and part of the contributions, what several sweeps of many relevances divide by.
    """

    graph: Graph
    residual_sums: dict[int, ResidualSum]
    config: Config
    logits: Tensor
    kept: dict[int, Any] = field(default_factory=dict)
    units: dict[int, Tensor] = field(default_factory=dict)
    bounds: dict[int, list[Tensor]] = field(default_factory=dict)
    denominators: dict[int, dict[WeightTransform, Tensor]] = field(default_factory=dict)


@dataclass
class _Run:
    graph: Graph
    residual_sums: dict[int, ResidualSum]
    config: Config
    values: dict[int, Tensor]
    carrying: set[int]
    ones: UnitActivation
    extremes: PixelBounds | None
    kept: dict[int, Any] = field(default_factory=dict)
    units: dict[int, Tensor] = field(default_factory=dict)
    bounds: dict[int, list[Tensor]] = field(default_factory=dict)

    def takes_part(self, node: Node) -> bool:
        """Whether relevance will pass this node (it does not pass what makes a gate)."""
        return node.index in self.carrying


def rule_name(node: Node, config: Config) -> str:
    """Which rule a linear layer has: the first-layer rule, that of fully connected layers, or that of the others."""
    if node.first and config.first_layer != "same":
        return config.first_layer
    dense = node.layer is not None and node.layer.operation == "linear"
    return config.linear_rule or config.rule if dense else config.rule


def run_forward(graph: Graph, residual_sums: dict[int, ResidualSum], config: Config, images: Tensor) -> ForwardTrace:
    """Run a graph on images (B, C, H, W); values are let go as soon as nothing needs them."""
    extremes = PixelBounds(graph, images, *config.bounds(images)) if config.first_layer == "zbox" else None
    run = _Run(
        graph, residual_sums, config, {0: images}, graph.reach({graph.logits}), UnitActivation(graph, images), extremes
    )
    waiting = {index: node.consumers for index, node in graph.nodes.items()}
    for index, node in graph.nodes.items():
        run.values[index] = FORWARD.get(node.kind, _evaluate)(run, node)
        for source in node.inputs:
            waiting[source] = waiting.get(source, 0) - 1
            if source and waiting[source] <= 0:
                run.values.pop(source, None)
    return ForwardTrace(graph, residual_sums, config, run.values[graph.logits], run.kept, run.units, run.bounds)


def _evaluate(run: _Run, node: Node) -> Tensor:
    return node.evaluate(run.values)


def _keep_inputs(run: _Run, node: Node) -> Tensor:
    if run.takes_part(node):
        run.kept[node.index] = [run.values[index] for index in node.inputs]
    return node.evaluate(run.values)


def _spread(run: _Run, node: Node) -> Tensor:
    """Keep the inputs; before the first linear layer, where pixels have any sign, what is made of ones in their place.

    The first-layer rule `epsilon` divides by signed sums, and `same` by whatever the other layers do.
    """
    signed = not all(i in run.graph.nodes and run.graph.nodes[i].non_negative for i in node.inputs)
    if not (node.first and signed) or run.config.first_layer in ("same", "epsilon"):
        return _keep_inputs(run, node)
    if run.takes_part(node):
        run.kept[node.index] = [run.ones.filled(index) for index in node.inputs]
    return node.evaluate(run.values)


def _maxpool(run: _Run, node: Node) -> Tensor:
    return (_keep_inputs if run.config.pooling == "winner" else _spread)(run, node)


def _linear(run: _Run, node: Node) -> Tensor:
    """Keep the input, and the output before BatchNorm if the rule divides by it; else fold BatchNorm."""
    layer, a = node.layer, run.values[node.inputs[0]]
    assert layer is not None
    takes_part = run.takes_part(node)
    keeps_output = takes_part and rule_name(node, run.config) in USES_OUTPUT
    folded = run.config.folded or not keeps_output
    z = layer.apply(a, Identity(), folded, layer.offset(folded))
    if takes_part:
        run.kept[node.index] = (a, z if keeps_output else None)
        if node.first:
            _keep_constants(run, node)
    if folded or layer.norm is None:
        return z
    return torch.addcmul(layer.per_channel(layer.norm.shift), z, layer.per_channel(layer.norm.scale))


def _keep_constants(run: _Run, node: Node) -> None:
    """Keep what rules that look at no pixel look at instead; it is the same for every image."""
    source, count = node.inputs[0], len(run.values[0])
    unit, bounds = run.ones.at(source), None if run.extremes is None else run.extremes.at(source)
    if unit is not None:
        run.units[node.index] = unit[:1] if len(unit) == count else unit
    if bounds is not None:
        run.bounds[node.index] = [b[:1] if len(b) == count else b for b in bounds]


def _weighted(run: _Run, node: Node) -> Tensor:
    """Keep the values, the output if the rule divides by it, and the weights of these images."""
    layer, a = weighted_layer_of(node, run.values), run.values[node.flow[0]]
    z, result = layer.run(a, run.config.folded)
    if run.takes_part(node):
        run.kept[node.index] = (a, z if rule_name(node, run.config) in USES_OUTPUT else None, layer)
    return result


def _relu(run: _Run, node: Node) -> Tensor:
    source = node.inputs[0]
    before = run.graph.nodes.get(source)
    fresh = before is not None and before.kind in ("linear", "sum") and before.consumers == 1
    if before is None or not fresh or _is_kept(run, before):
        return torch.relu(run.values[source])
    return torch.relu_(run.values[source])


def _is_kept(run: _Run, node: Node) -> bool:
    """Whether the value itself, not only what it was made from, is waiting for the way back."""
    return node.kind == "linear" and node.index in run.kept and run.kept[node.index][1] is not None


def _sum(run: _Run, node: Node) -> Tensor:
    if len(node.inputs) == 1 or not run.takes_part(node):
        return node.evaluate(run.values)
    junction = run.residual_sums[node.index]
    deep, skip = (run.values[node.inputs[i]] for i in (junction.deep, 1 - junction.deep))
    if run.config.residual in SHARES:
        run.kept[node.index] = SHARES[run.config.residual](deep, skip, junction)
    source = run.graph.nodes.get(node.inputs[junction.deep])
    fresh = source is not None and source.kind == "linear" and source.consumers == 1 and not _is_kept(run, source)
    return deep.add_(skip) if fresh and deep.shape == node.call.shape else deep + skip


def _region(run: _Run, node: Node) -> Tensor:
    if run.config.block_weights == "signed":
        region: RegionRun = run_region(node, run.values)
        if run.takes_part(node):
            run.kept[node.index] = region
        return region.output.detach()
    inside = evaluate_region(node, run.values)
    if run.takes_part(node):
        run.kept[node.index] = run_clamped(node, run.values, inside)
    return inside[node.index]


FORWARD: dict[str, Callable[[_Run, Node], Tensor]] = {
    "linear": _linear,
    "weighted": _weighted,
    "relu": _relu,
    "sum": _sum,
    "route": _keep_inputs,
    "pad": _keep_inputs,
    "maxpool": _maxpool,
    "spread": _spread,
    "region": _region,
}
