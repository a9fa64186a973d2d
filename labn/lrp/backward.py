"""The sweep from the logits to the pixels: one step per kind of node, every step conserving or booking its leaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError
from labn.lrp.forward import ForwardTrace, rule_name
from labn.lrp.rules.block import RegionRun, book_biases
from labn.lrp.rules.conservation import ConservationReport
from labn.lrp.rules.elementary import RULES, Step, divide
from labn.lrp.rules.first_layer import covered
from labn.lrp.rules.linear_layers import gradients
from labn.lrp.tracing.graph import Node


@dataclass
class _Sweep:
    trace: ForwardTrace
    conservation: ConservationReport | None


def sweep(
    trace: ForwardTrace, seeds: dict[int, Tensor], until: int = 0, conservation: ConservationReport | None = None
) -> Tensor:
    """Send relevance from the values `seeds` names down to the value `until` (0: the images).

    Args:
        trace: a forward pass; it may be swept any number of times.
        seeds: relevance by value index, each (T, ...) where T is the forward batch, or any T if that was 1.
        until: the value at which relevance is collected.
        conservation: filled with one entry per layer.

    Returns:
        (T, ...) in the shape of the value `until`.
    """
    messages = {index: seed.clone() for index, seed in seeds.items()}  # messages may be changed in place
    state = _Sweep(trace, conservation)
    for index in sorted(trace.graph.nodes, reverse=True):
        if index > until and index in messages:
            node = trace.graph.nodes[index]
            _deliver(messages, node, _step(state, node, messages.pop(index)))
    if until not in messages:
        raise InputError("No relevance reaches the requested layer: it does not lie below the layer it starts from.")
    return messages[until]


def _step(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    parts = BACKWARD[node.kind]
    booked = state.conservation is not None and node.kind in _BOOKED
    if not booked or state.conservation is None:
        return parts(state, node, r)
    state.conservation.open(node.label, r)
    delivered = parts(state, node, r)
    state.conservation.close(delivered)
    return delivered


def _deliver(messages: dict[int, Tensor], node: Node, parts: list[Tensor]) -> None:
    for source, part in zip(node.flow, parts):
        waiting = messages.get(source)
        if waiting is None:
            messages[source] = part
        else:
            messages[source] = part.add_(waiting) if node.kind == "linear" else part + waiting


def _unchanged(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    return [r]


def _linear(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    config = state.trace.config
    a, z, *made = state.trace.kept[node.index]
    before = state.trace.graph.nodes.get(node.flow[0])
    layer = made[0] if made else node.layer
    assert layer is not None
    many = len(a) == 1 < len(r) and state.conservation is None
    kept = state.trace.denominators.setdefault(node.index, {}) if many else None
    unit = state.trace.units.get(node.index)
    bounds = state.trace.bounds.get(node.index)
    step = Step(
        layer, a, z, r, before is not None and before.non_negative, config, state.conservation, kept, unit, bounds
    )
    with made[0].weights.held() if made else nullcontext():
        return [RULES[rule_name(node, config)](step)]


def _sum(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    if len(node.inputs) == 1:
        return [r]
    config, junction = state.trace.config, state.trace.residual_sums[node.index]
    if config.residual == "duplicate":
        if state.conservation is not None:
            state.conservation.duplicated(r)
        parts = [r, r]
    else:
        deep = r * state.trace.kept[node.index]
        rest = r.sub_(deep)
        parts = [deep, rest] if junction.deep == 0 else [rest, deep]
    return [_unbroadcast(part, state.trace, index) for part, index in zip(parts, node.inputs)]


def _unbroadcast(part: Tensor, trace: ForwardTrace, index: int) -> Tensor:
    shape = trace.graph.nodes[index].call.shape if index else part.shape
    return part if part.shape[1:] == shape[1:] else part.sum_to_size(len(part), *shape[1:])


def _rerun(node: Node, kept: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    values = {index: a.detach().requires_grad_(index in node.flow) for index, a in zip(node.inputs, kept)}
    with torch.enable_grad():
        return [values[index] for index in node.flow], node.evaluate(values)


def _route(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    leaves, output = _rerun(node, state.trace.kept[node.index])
    return gradients(output, leaves, r)


def _pad(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Copies hand on what they get; a border that is filled in has no input that could take its relevance."""
    if state.conservation is not None:
        source = covered(node, dict(zip(node.inputs, state.trace.kept[node.index])))
        state.conservation.stabilised(source, r * ~source)
    return _route(state, node, r)


def _spread(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """R_i = a_i sum_j c_ij R_j / (z_j + e_j) with the operation's own coefficients c >= 0.

    Without a linear layer below, ones were kept in place of the pixels: R_i = sum_j c_ij R_j / sum_i' c_i'j.
    """
    leaves, z = _rerun(node, state.trace.kept[node.index])
    s = divide(r, z.detach(), state.trace.config, state.conservation)
    return [a.detach() * c for a, c in zip(leaves, gradients(z, leaves, s))]


def _maxpool(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Winner takes all: the gradient; or an average over the same windows."""
    if state.trace.config.pooling == "winner":
        return _route(state, node, r)
    return _spread(state, _averaged(node), r)


def _averaged(node: Node) -> Node:
    """The average pool over the windows of a max pool."""
    call = node.call
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {**dict(zip(names, call.args)), **call.kwargs}
    function = getattr(F, call.operation.replace("max", "avg"))
    if call.operation.startswith("adaptive"):
        return replace(node, call=replace(call, func=function, args=call.args[:2], kwargs={}, item=None))
    if given.get("dilation", 1) not in (1, (1, 1), [1, 1]):
        raise InputError(f"pooling='average' has no rule for the dilated max pool {node.label}; use pooling='winner'.")
    args = (
        given["input"],
        given["kernel_size"],
        given.get("stride"),
        given.get("padding", 0),
        given.get("ceil_mode", False),
    )
    return replace(node, call=replace(call, func=function, args=args, kwargs={}, item=None))


def _region(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    run: RegionRun = state.trace.kept[node.index]
    s = divide(r, run.output.detach(), state.trace.config, state.conservation)
    if state.conservation is not None and state.trace.config.block_weights == "signed":
        book_biases(state.conservation, node, run, s)
    return [run.entry.detach() * gradients(run.output, [run.entry], s)[0]]


BACKWARD: dict[str, Callable[[_Sweep, Node, Tensor], list[Tensor]]] = {
    **dict.fromkeys(("norm", "relu", "identity", "pass", "rescale", "product"), _unchanged),
    **dict.fromkeys(("linear", "weighted"), _linear),
    "sum": _sum,
    "route": _route,
    "pad": _pad,
    "spread": _spread,
    "maxpool": _maxpool,
    "region": _region,
}
_BOOKED = {"linear", "weighted", "sum", "pad", "spread", "maxpool", "region"}
