"""The forward pass of a propagation: BatchNorm is folded where the rules allow it, and only what they need is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from labn.lrp.config import Config
from labn.lrp.layer_rules import LayerRule
from labn.lrp.rules.activations import share_of_argument
from labn.lrp.rules.block import RegionRun, evaluate_region, run_clamped, run_region
from labn.lrp.rules.elementary import USES_OUTPUT
from labn.lrp.rules.first_layer import PixelBounds, UnitActivation
from labn.lrp.rules.residual_sums import SHARES, ResidualSum
from labn.lrp.rules.weighted_layer import weighted_layer_of
from labn.lrp.tracing.graph import Graph, Node
from labn.lrp.tracing.layer_kinds import kinds_of
from labn.lrp.weight_transforms import Identity, WeightTransform


@dataclass
class ForwardTrace:
    """A forward pass with the values that the backward sweep needs.

    Attributes:
        graph, residual_sums, config: the graph that was run, its residual sums by node index, and the rules.
        logits: (B, K).
        saved: node index -> the values that the backward step of this kind of node needs.
        units: node index of a first linear layer -> its input for an all-ones image (see `labn.lrp.rules.first_layer`);
            without an entry that input is all ones.
        bounds: node index of a first linear layer under the rule `zbox` -> its input for the lowest and highest pixels.
        denominators: node index -> weight transform -> z + e, which the sweeps over one image share.
        rules: node index -> name and parameters of the rule that a composite gives the layer.
    """

    graph: Graph
    residual_sums: dict[int, ResidualSum]
    config: Config
    logits: Tensor
    saved: dict[int, Any] = field(default_factory=dict)
    units: dict[int, Tensor] = field(default_factory=dict)
    bounds: dict[int, list[Tensor]] = field(default_factory=dict)
    denominators: dict[int, dict[WeightTransform, Tensor]] = field(default_factory=dict)
    rules: dict[int, tuple[str, Config]] = field(default_factory=dict)


@dataclass
class _Run:
    graph: Graph
    residual_sums: dict[int, ResidualSum]
    config: Config
    values: dict[int, Tensor]
    carrying: set[int]
    ones: UnitActivation
    extremes: PixelBounds | None
    rules: dict[int, tuple[str, Config]]
    saved: dict[int, Any] = field(default_factory=dict)
    units: dict[int, Tensor] = field(default_factory=dict)
    bounds: dict[int, list[Tensor]] = field(default_factory=dict)

    def rule(self, node: Node) -> str:
        """Name of a layer's rule."""
        return self.rules[node.index][0] if node.index in self.rules else rule_name(node, self.config)

    def carries(self, node: Node) -> bool:
        """Whether relevance will pass this node; the nodes that compute a gate receive none."""
        return node.index in self.carrying


def rules_of(graph: Graph, config: Config) -> dict[int, tuple[str, Config]]:
    """Node index -> name and parameters of the rule, for the layers that the composite of `config` has a rule for."""
    composite = tuple(rule for rule in config.composite or () if isinstance(rule, LayerRule))
    if not composite:
        return {}
    reached = graph.reach({graph.logits})
    layers = [node for index, node in graph.nodes.items() if index in reached and node.kind in ("linear", "weighted")]
    rules = {}
    for k, node in enumerate(layers):
        kinds, depth = kinds_of(node, graph), k / max(1, len(layers) - 1)
        fitting = (rule for rule in composite if rule.fits(kinds, node.first, depth, node.call.module))
        rule = next(fitting, None)
        if rule is not None:
            rules[node.index] = rule.rule, replace(config, **rule.parameters)
    return rules


def rule_name(node: Node, config: Config) -> str:
    """Name of a linear layer's rule: the first-layer rule, that of fully connected layers, or that of the others."""
    if node.first and config.first_layer != "same":
        return config.first_layer
    dense = node.layer is not None and node.layer.operation == "linear"
    return config.linear_rule or config.rule if dense else config.rule


def run_forward(graph: Graph, residual_sums: dict[int, ResidualSum], config: Config, images: Tensor) -> ForwardTrace:
    """Run a graph on images (B, C, H, W); every value is freed after its last consumer has run."""
    rules = rules_of(graph, config)
    boxed = config.first_layer == "zbox" or any(name == "zbox" for name, _ in rules.values())
    extremes = PixelBounds(graph, images, *config.bounds(images)) if boxed else None
    carrying, ones = graph.reach({graph.logits}), UnitActivation(graph, images)
    run = _Run(graph, residual_sums, config, {0: images}, carrying, ones, extremes, rules)
    # Reference counts: how many nodes still have to read each value.
    waiting = {index: node.consumers for index, node in graph.nodes.items()}
    for index, node in graph.nodes.items():
        run.values[index] = FORWARD.get(node.kind, _evaluate)(run, node)
        for source in node.inputs:
            waiting[source] = waiting.get(source, 0) - 1
            if source and waiting[source] <= 0:
                run.values.pop(source, None)
    logits = run.values[graph.logits]
    return ForwardTrace(graph, residual_sums, config, logits, run.saved, run.units, run.bounds, rules=rules)


def _evaluate(run: _Run, node: Node) -> Tensor:
    return node.evaluate(run.values)


def _keep_inputs(run: _Run, node: Node) -> Tensor:
    if run.carries(node):
        run.saved[node.index] = [run.values[index] for index in node.inputs]
    return node.evaluate(run.values)


def _spread(run: _Run, node: Node) -> Tensor:
    """Keep the inputs; or, before the first linear layer, where values have any sign, those of an all-ones image.

    The first-layer rule `epsilon` divides by signed sums, and `same` by the sums of the other layers: both need the
    values themselves.
    """
    signed = not all(i in run.graph.nodes and run.graph.nodes[i].non_negative for i in node.inputs)
    if not (node.first and signed) or run.config.first_layer in ("same", "epsilon"):
        return _keep_inputs(run, node)
    if run.carries(node):
        run.saved[node.index] = [run.ones.filled(index) for index in node.inputs]
    return node.evaluate(run.values)


def _maxpool(run: _Run, node: Node) -> Tensor:
    return (_keep_inputs if run.config.pooling == "winner" else _spread)(run, node)


def _linear(run: _Run, node: Node) -> Tensor:
    """Keep the input, and the output before BatchNorm if the rule divides by it; fold BatchNorm otherwise."""
    layer, a = node.layer, run.values[node.inputs[0]]
    assert layer is not None
    carries = run.carries(node)
    keeps_output = carries and run.rule(node) in USES_OUTPUT
    folded = run.config.folded or not keeps_output
    z = layer.apply(a, Identity(), folded, layer.offset(folded))
    if carries:
        run.saved[node.index] = (a, z if keeps_output else None)
        if node.first:
            _keep_constants(run, node)
    if folded or layer.norm is None:
        return z
    # The rule divides by z, the next layer reads the normalised output.
    return torch.addcmul(layer.per_channel(layer.norm.shift), z, layer.per_channel(layer.norm.scale))


def _keep_constants(run: _Run, node: Node) -> None:
    """Keep the layer's inputs for constant images, which rules read in place of the pixels."""
    source, count = node.inputs[0], len(run.values[0])
    # All images of the batch share them, so one is enough, unless an operation has merged the batch axis with another.
    unit, bounds = run.ones.at(source), None if run.extremes is None else run.extremes.at(source)
    if unit is not None:
        run.units[node.index] = unit[:1] if len(unit) == count else unit
    if bounds is not None:
        run.bounds[node.index] = [b[:1] if len(b) == count else b for b in bounds]


def _weighted(run: _Run, node: Node) -> Tensor:
    """Keep the values, the output if the rule divides by it, and the weights of these images."""
    layer, a = weighted_layer_of(node, run.values), run.values[node.flow[0]]
    z, result = layer.run(a, run.config.folded)
    if run.carries(node):
        run.saved[node.index] = (a, z if run.rule(node) in USES_OUTPUT else None, layer)
    return result


def _relu(run: _Run, node: Node) -> Tensor:
    """ReLU, in place where the input is a new tensor that no other node and no backward step reads."""
    source = node.inputs[0]
    before = run.graph.nodes.get(source)
    fresh = before is not None and before.kind in ("linear", "sum") and before.consumers == 1
    if before is None or not fresh or _is_kept(run, before):
        return torch.relu(run.values[source])
    return torch.relu_(run.values[source])


def _is_kept(run: _Run, node: Node) -> bool:
    """Whether the backward sweep needs this node's own output, beside its input."""
    return node.kind == "linear" and node.index in run.saved and run.saved[node.index][1] is not None


def _sum(run: _Run, node: Node) -> Tensor:
    if len(node.inputs) == 1 or not run.carries(node):
        return node.evaluate(run.values)
    residual_sum = run.residual_sums[node.index]
    deep, skip = (run.values[node.inputs[i]] for i in (residual_sum.deep, residual_sum.skip))
    if node.kind == "difference":
        return _difference(run, node, deep, skip)
    if run.config.residual in SHARES:
        run.saved[node.index] = SHARES[run.config.residual](deep, skip, residual_sum)
    # In place into the deep branch where it is the fresh output of a convolution, as the network's own `+=` would be.
    source = run.graph.nodes.get(node.inputs[residual_sum.deep])
    fresh = source is not None and source.kind == "linear" and source.consumers == 1 and not _is_kept(run, source)
    return deep.add_(skip) if fresh and deep.shape == node.call.shape else deep + skip


def _difference(run: _Run, node: Node, deep: Tensor, skip: Tensor) -> Tensor:
    """a - b is a sum of a and -b."""
    residual_sum = run.residual_sums[node.index]
    signs = (1, -1) if residual_sum.deep == 0 else (-1, 1)
    if run.config.residual in SHARES:
        run.saved[node.index] = SHARES[run.config.residual](signs[0] * deep, signs[1] * skip, residual_sum)
    return deep - skip if residual_sum.deep == 0 else skip - deep


def _activation_offset(run: _Run, node: Node) -> Tensor:
    """Keep the share of the argument; the constant f(0) has the rest."""
    x = run.values[node.flow[0]]
    if run.carries(node):
        run.saved[node.index] = share_of_argument(node, x, run.config)
    return node.evaluate(run.values)


def _normalisation(run: _Run, node: Node) -> Tensor:
    return (_keep_inputs if run.config.norm == "linear" else _evaluate)(run, node)


def _softmax(run: _Run, node: Node) -> Tensor:
    """Keep scores and shares of a softmax that hands relevance on."""
    shares = node.evaluate(run.values)
    if run.carries(node) and node.flow:
        run.saved[node.index] = [run.values[node.flow[0]], shares]
    return shares


def _region(run: _Run, node: Node) -> Tensor:
    if run.config.block_weights == "signed":
        region: RegionRun = run_region(node, run.values)
        if run.carries(node):
            run.saved[node.index] = region
        return region.output.detach()
    inside = evaluate_region(node, run.values)
    if run.carries(node):
        run.saved[node.index] = run_clamped(node, run.values, inside)
    return inside[node.index]


FORWARD: dict[str, Callable[[_Run, Node], Tensor]] = {
    "linear": _linear,
    "weighted": _weighted,
    "relu": _relu,
    **dict.fromkeys(("sum", "difference"), _sum),
    **dict.fromkeys(("matmul", "maximum"), _keep_inputs),
    "activation_offset": _activation_offset,
    "normalisation": _normalisation,
    "softmax": _softmax,
    "route": _keep_inputs,
    "pad": _keep_inputs,
    "affine": _keep_inputs,
    "maxpool": _maxpool,
    "spread": _spread,
    "region": _region,
}
