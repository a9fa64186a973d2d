"""Residual blocks differentiated as one layer, the rule of C3-LRP (JSAI 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from labn.lrp.rules.conservation import ConservationReport
from labn.lrp.rules.linear_layers import Norm, gradients, transposable
from labn.lrp.rules.weighted_layer import weighted_layer_of
from labn.lrp.tracing.graph import Node
from labn.lrp.weight_transforms import Identity, Positive

# What a region may contain: each of these is linear in its carried input once ReLU and max masks are fixed.
PIECEWISE_LINEAR = {
    "linear", "weighted", "norm", "relu", "identity", "pass", "route", "pad", "maxpool", "spread", "sum",
    "product",
}  # fmt: skip


@dataclass
class RegionRun:
    """A region as run: its input as a leaf of an autograd graph, its output, the values it read from outside, and one
    leaf per bias, if asked for.
    """

    entry: Tensor
    output: Tensor
    sources: dict[int, Tensor]
    biases: list[Tensor] = field(default_factory=list)


def run_region(node: Node, values: dict[int, Tensor], with_biases: bool = False) -> RegionRun:
    """Run the nodes of a region with gradients, in eval mode and BatchNorm folded; gates get none.

    `with_biases` makes every bias a leaf (B, ...) of its own, so that what each one keeps can be told per image.
    """
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

    Its output is then homogeneous in its input, so that x * d<s, y>/dx adds up to <s, y>. Gates keep their
    values, as do the constants that weights are made from.

    Args:
        node: the region.
        values: what it reads.
        inside: its true values, from `evaluate_region`.
    """
    entry = values[node.flow[0]].detach().requires_grad_()
    carrying = carrying_in(node)
    clamped = {**inside, node.flow[0]: entry}
    with torch.enable_grad():
        for inner in node.inner:
            if inner.index in carrying:
                given = {i: (clamped if i in inner.flow else inside)[i] for i in inner.inputs}
                clamped[inner.index] = _CLAMPED.get(inner.kind, Node.evaluate)(inner, given)
    return RegionRun(entry, clamped[node.index], {index: values[index] for index in node.inputs})


def carrying_in(node: Node) -> set[int]:
    """Indices of the values inside a region that relevance passes; the others only make up gates."""
    carrying = {node.index}
    for inner in reversed(node.inner):
        if inner.index in carrying:
            carrying.update(inner.flow)
    return carrying


def _evaluate(node: Node, values: dict[int, Tensor], biases: list[Tensor] | None) -> Tensor:
    values = {i: values[i] if i in node.flow else values[i].detach() for i in node.inputs}  # gates, weights
    value = _AFFINE.get(node.kind, Node.evaluate)(node, values)
    if biases is None or node.kind not in ("linear", "weighted", "norm", "pass") or not value.requires_grad:
        return value
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


_AFFINE: dict[str, Callable[[Node, dict[int, Tensor]], Tensor]] = {"linear": _linear, "weighted": _weighted}


def _clamped_linear(node: Node, values: dict[int, Tensor]) -> Tensor:
    assert node.layer is not None
    return node.layer.apply(values[node.inputs[0]], Positive(), True)


def _clamped_weighted(node: Node, values: dict[int, Tensor]) -> Tensor:
    return transposable(weighted_layer_of(node, values), values[node.flow[0]], Positive(), True)


def _clamped_norm(node: Node, values: dict[int, Tensor]) -> Tensor:
    a = values[node.inputs[0]]
    return a * Norm.of(node.call).scale.clamp(min=0).view(-1, *[1] * (a.ndim - 2))


def _without_constant(node: Node, values: dict[int, Tensor]) -> Tensor:
    """f(a) - f(0): a scaling stays, a shift goes."""
    zeros = {index: torch.zeros_like(values[index]) for index in node.inputs}
    return node.evaluate(values) - node.evaluate(zeros)


_CLAMPED: dict[str, Callable[[Node, dict[int, Tensor]], Tensor]] = {
    "linear": _clamped_linear,
    "weighted": _clamped_weighted,
    "norm": _clamped_norm,
    "pass": _without_constant,
}


def book_biases(conservation: ConservationReport, node: Node, run: RegionRun, s: Tensor) -> None:
    """Book what the effective bias of a region keeps: <s, y - J x> = sum over its biases b of <d<s, y>/db, b>."""
    probe = run_region(node, run.sources, with_biases=True)
    if probe.biases:
        for bias, gradient in zip(probe.biases, gradients(probe.output, probe.biases, s)):
            conservation.biased(gradient * bias.detach())
