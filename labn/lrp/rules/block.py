"""The block rule of C3-LRP (JSAI 2024): a residual block, or several in a row, differentiated as one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from labn.lrp.rules.activations import secant, slope
from labn.lrp.rules.conservation import ConservationReport
from labn.lrp.rules.linear_layers import Norm, gradients, transposable
from labn.lrp.rules.maxima import with_shared_ties
from labn.lrp.rules.normalisation import with_constant_deviation
from labn.lrp.rules.products import halved
from labn.lrp.rules.weighted_layer import weighted_layer_of
from labn.lrp.tracing.graph import Node
from labn.lrp.weight_transforms import Identity, Positive

# Kinds of nodes in a region: each is linear in the input that carries relevance once ReLU and max masks, the slopes
# f(x) / x of other activations, the deviations of norms, and one factor of each product are fixed.
PIECEWISE_LINEAR = {
    "linear", "weighted", "norm", "relu", "identity", "pass", "route", "pad", "maxpool", "spread", "sum",
    "product", "difference", "quotient", "maximum", "rescale", "matmul", "activation", "activation_offset",
    "normalisation",
}  # fmt: skip


# Those that `block_weights="zplus"` makes functions of degree one with non-negative coefficients.
CLAMPABLE = PIECEWISE_LINEAR - {"difference", "quotient", "matmul", "activation_offset", "normalisation", "rescale"}


@dataclass
class RegionRun:
    """The autograd graph of a region.

    Attributes:
        entry: the region's input that carries relevance, as a leaf.
        output: the region's output.
        sources: index -> value, for all values that the region reads from outside.
        biases: one leaf per bias, in order; empty unless they were asked for.
    """

    entry: Tensor
    output: Tensor
    sources: dict[int, Tensor]
    biases: list[Tensor] = field(default_factory=list)


def run_region(node: Node, values: dict[int, Tensor], with_biases: bool = False) -> RegionRun:
    """Run the nodes of a region with gradients to its entry and BatchNorm folded; gates are constants.

    Args:
        node: the region.
        values: index -> value, for the values that the region reads.
        with_biases: add every bias as a leaf (B, ...), so that the relevance it keeps is known per image.
    """
    # A leaf: the gradient stops at the region's input.
    entry = values[node.flow[0]].detach().requires_grad_()
    sources = {index: values[index].detach() for index in node.inputs}
    inside = {**sources, node.flow[0]: entry}
    carrying = carrying_in(node)
    run = RegionRun(entry, entry, sources)
    for inner in node.inner:
        with torch.set_grad_enabled(inner.index in carrying):
            inside[inner.index] = _evaluate(inner, inside, run.biases if with_biases else None)
    run.output = inside[node.index]
    return run


def evaluate_region(node: Node, values: dict[int, Tensor]) -> dict[int, Tensor]:
    """The values inside a region, BatchNorm folded, without gradients."""
    inside = {index: values[index] for index in node.inputs}
    for inner in node.inner:
        inside[inner.index] = _AFFINE.get(inner.kind, Node.evaluate)(inner, inside)
    return inside


def run_clamped(node: Node, values: dict[int, Tensor], inside: dict[int, Tensor]) -> RegionRun:
    """Run a region with clamped weights and without biases, as z+ does with a single layer.

    The output is then homogeneous in the input, so that x * d<s, y>/dx adds up to <s, y> and relevance is conserved.
    Gates, and the constants that weights are made from, keep their true values.

    Args:
        node: the region.
        values: index -> value, for the values that the region reads.
        inside: the true values inside the region, from `evaluate_region`.
    """
    entry = values[node.flow[0]].detach().requires_grad_()
    carrying = carrying_in(node)
    clamped = {**inside, node.flow[0]: entry}
    with torch.enable_grad():
        for inner in node.inner:
            if inner.index in carrying:
                inputs = {i: (clamped if i in inner.flow else inside)[i] for i in inner.inputs}
                clamped[inner.index] = _CLAMPED.get(inner.kind, Node.evaluate)(inner, inputs)
                if inner.kind == "activation":  # its slope is a gate, which keeps its true value
                    source = inner.flow[0]
                    clamped[inner.index] = clamped[source] * slope(inner, inside[source])
    return RegionRun(entry, clamped[node.index], {index: values[index] for index in node.inputs})


def carrying_in(node: Node) -> set[int]:
    """Indices of the values inside a region that relevance passes; the other values only compute gates."""
    carrying = {node.index}
    for inner in reversed(node.inner):
        if inner.index in carrying:
            carrying.update(inner.flow)
    return carrying


def _evaluate(node: Node, values: dict[int, Tensor], biases: list[Tensor] | None) -> Tensor:
    # Gates and the constants of weights receive no gradient.
    values = {i: values[i] if i in node.flow else values[i].detach() for i in node.inputs}
    value = _AFFINE.get(node.kind, Node.evaluate)(node, values)
    if biases is None or node.kind not in _WITH_CONSTANT or not value.requires_grad:
        return value
    # The affine map's constant is its value at zero; y = (y - b) + b makes b a leaf without changing y.
    constant = _AFFINE.get(node.kind, Node.evaluate)(
        node, {i: torch.zeros_like(v) if i in node.flow else v for i, v in values.items()}
    )
    biases.append(constant.detach().requires_grad_())
    return value - constant.detach() + biases[-1]


def _linear(node: Node, values: dict[int, Tensor]) -> Tensor:
    assert node.layer is not None
    return node.layer.apply(values[node.inputs[0]], Identity(), True, node.layer.offset(True))


def _weighted(node: Node, values: dict[int, Tensor]) -> Tensor:
    return weighted_layer_of(node, values).run(values[node.flow[0]], True)[1]


def _secant(node: Node, values: dict[int, Tensor]) -> Tensor:
    if not torch.is_grad_enabled():  # a gate, or a plain value
        return node.evaluate(values)
    return secant(node, values[node.flow[0]])


def _normalisation(node: Node, values: dict[int, Tensor]) -> Tensor:
    if not torch.is_grad_enabled():
        return node.evaluate(values)
    return with_constant_deviation(node.call, values[node.flow[0]])[0]


def _product(node: Node, values: dict[int, Tensor]) -> Tensor:
    gated = len(node.flow) < len(node.inputs) or not torch.is_grad_enabled()
    return node.evaluate(values) if gated else halved(node, values)


def _maximum(node: Node, values: dict[int, Tensor]) -> Tensor:
    return with_shared_ties(node).evaluate(values)


_AFFINE: dict[str, Callable[[Node, dict[int, Tensor]], Tensor]] = {
    "linear": _linear,
    "weighted": _weighted,
    **dict.fromkeys(("activation", "activation_offset", "rescale"), _secant),
    "normalisation": _normalisation,
    **dict.fromkeys(("product", "matmul"), _product),
    "maximum": _maximum,
}

# Kinds of nodes whose value at zero need not be zero: biases, shifts, filled-in values.
_WITH_CONSTANT = {"linear", "weighted", "norm", "pass", "activation_offset", "normalisation", "route", "pad"}


def _clamped_linear(node: Node, values: dict[int, Tensor]) -> Tensor:
    assert node.layer is not None
    return node.layer.apply(values[node.inputs[0]], Positive(), True)


def _clamped_weighted(node: Node, values: dict[int, Tensor]) -> Tensor:
    return transposable(weighted_layer_of(node, values), values[node.flow[0]], Positive(), True)


def _clamped_norm(node: Node, values: dict[int, Tensor]) -> Tensor:
    a = values[node.inputs[0]]
    return a * Norm.of(node.call).scale.clamp(min=0).view(-1, *[1] * (a.ndim - 2))


def _without_constant(node: Node, values: dict[int, Tensor]) -> Tensor:
    """f(a) - f(0): keeps a scaling and removes a shift."""
    # Scalings and shifts by constants are affine, so f(0) is their constant.
    zeros = {index: torch.zeros_like(values[index]) for index in node.inputs}
    return node.evaluate(values) - node.evaluate(zeros)


_CLAMPED: dict[str, Callable[[Node, dict[int, Tensor]], Tensor]] = {
    "linear": _clamped_linear,
    "weighted": _clamped_weighted,
    "norm": _clamped_norm,
    "pass": _without_constant,
}


def book_biases(conservation: ConservationReport, node: Node, run: RegionRun, s: Tensor) -> None:
    """Enter in the report the relevance that the biases of a region keep.

    It is <s, y - J x> = sum over the biases b of <d<s, y>/db, b>, with the Jacobian J of the output y at the input x.
    """
    # A second run, because bias leaves change the graph; the report is not computed in ordinary use.
    probe = run_region(node, run.sources, with_biases=True)
    if probe.biases:
        for bias, gradient in zip(probe.biases, gradients(probe.output, probe.biases, s)):
            conservation.biased(gradient * bias.detach())
