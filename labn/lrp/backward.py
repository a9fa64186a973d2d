"""The backward sweep of relevance from the logits to the pixels, one step per kind of node.

Every step hands on all the relevance that it receives, or enters in the conservation report what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError
from labn.lrp.forward import ForwardTrace, rule_name
from labn.lrp.rules import normalisation, products
from labn.lrp.rules.block import RegionRun, book_biases
from labn.lrp.rules.conservation import ConservationReport
from labn.lrp.rules.elementary import RULES, Step, divide
from labn.lrp.rules.first_layer import covered
from labn.lrp.rules.linear_layers import gradients
from labn.lrp.rules.maxima import with_shared_ties
from labn.lrp.tracing.graph import Node
from labn.lrp.tracing.operations import softmax_axis


@dataclass
class _Sweep:
    trace: ForwardTrace
    conservation: ConservationReport | None


def sweep(
    trace: ForwardTrace, seeds: dict[int, Tensor], until: int = 0, conservation: ConservationReport | None = None
) -> Tensor:
    """Propagate relevance from the values in `seeds` down to the value `until` (0: the images).

    Args:
        trace: a forward pass; it may be swept any number of times.
        seeds: value index -> relevance (T, ...), where T is the batch size of the forward, or any T if that is 1.
        until: index of the value at which relevance is collected.
        conservation: filled with one entry per layer.

    Returns:
        (T, ...) in the shape of the value `until`.

    Raises:
        InputError: no relevance reaches the value `until`.
    """
    messages = {index: seed.clone() for index, seed in seeds.items()}  # rules work in place where they can
    state = _Sweep(trace, conservation)
    # Indices follow the order of computation: when a node is reached, all its consumers have delivered their message.
    for index in sorted(trace.graph.nodes, reverse=True):
        if index > until and index in messages:
            node = trace.graph.nodes[index]
            _deliver(messages, node, _step(state, node, messages.pop(index)))
    if until not in messages:
        raise InputError("No relevance reaches the requested layer: it does not lie below the layer it starts from.")
    return messages[until]


def _step(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """The message to each value in `node.flow`."""
    propagate = BACKWARD[node.kind]
    if state.conservation is None or not _is_reported(node):
        return propagate(state, node, r)
    state.conservation.open(node.label, r)
    delivered = propagate(state, node, r)
    state.conservation.close(delivered)
    return delivered


def _is_reported(node: Node) -> bool:
    """Whether a node may keep relevance, or has weights."""
    return node.kind in _REPORTED or (node.kind == "route" and node.fills)


def _deliver(messages: dict[int, Tensor], node: Node, delivered: list[Tensor]) -> None:
    """Add the messages of a node to those that wait at its inputs."""
    for source, message in zip(node.flow, delivered):
        waiting = messages.get(source)
        if waiting is None:
            messages[source] = message
        else:
            # Only a linear layer's message is a fresh tensor; the others may share memory with one another.
            messages[source] = message.add_(waiting) if node.kind == "linear" else message + waiting


def _unchanged(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    return [r]


def _linear(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Apply the rule of a linear layer, or of a weighted product, whose weights the forward pass kept."""
    trace = state.trace
    rule, config = trace.rules.get(node.index) or (rule_name(node, trace.config), trace.config)
    a, z, *per_image = trace.saved[node.index]
    before = trace.graph.nodes.get(node.flow[0])
    layer = per_image[0] if per_image else node.layer
    assert layer is not None
    # Many relevance maps of one image divide by the same denominators, which are computed once.
    many = len(a) == 1 < len(r) and state.conservation is None
    step = Step(
        layer,
        a,
        z,
        r,
        non_negative=before is not None and before.non_negative,
        config=config,
        conservation=state.conservation,
        denominators=trace.denominators.setdefault(node.index, {}) if many else None,
        unit=trace.units.get(node.index),
        bounds=trace.bounds.get(node.index),
    )
    with per_image[0].weights.held() if per_image else nullcontext():
        return [RULES[rule](step)]


def _affine(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """A BatchNorm as a layer of its own, by the epsilon rule: R_x = g x R / (g x + c + e)."""
    assert node.norm is not None
    (a,) = state.trace.saved[node.index]
    per_channel = (-1, *[1] * (a.ndim - 2))
    scale, shift = (v.view(per_channel) if v.ndim == 1 else v for v in (node.norm.scale, node.norm.shift))
    s = divide(r, torch.addcmul(shift, a, scale), state.trace.config, state.conservation)
    if state.conservation is not None:
        state.conservation.biased(s * shift)
    return [s * a * scale]


def _sum(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Divide relevance between the branches of a residual sum."""
    if len(node.inputs) == 1:  # x + x: both operands are one value
        return [r]
    config, residual_sum = state.trace.config, state.trace.residual_sums[node.index]
    if config.residual == "duplicate":
        if state.conservation is not None:
            state.conservation.duplicated(r)
        messages = [r, r]
    else:
        deep = r * state.trace.saved[node.index]
        skip = r.sub_(deep)  # the difference, not r * (1 - share): the two add up to r exactly
        messages = [deep, skip] if residual_sum.deep == 0 else [skip, deep]
    return [_unbroadcast(message, state.trace, index) for message, index in zip(messages, node.inputs)]


def _unbroadcast(message: Tensor, trace: ForwardTrace, index: int) -> Tensor:
    """Sum a message over the axes along which the value `index` was broadcast in the sum."""
    shape = trace.graph.nodes[index].call.shape if index else message.shape
    return message if message.shape[1:] == shape[1:] else message.sum_to_size(len(message), *shape[1:])


def _rerun(node: Node, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Evaluate a node again with gradients: its inputs that receive relevance, as leaves, and its output."""
    values = {index: a.detach().requires_grad_(index in node.flow) for index, a in zip(node.inputs, inputs)}
    with torch.enable_grad():
        return [values[index] for index in node.flow], node.evaluate(values)


def _route(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Operations that copy values: the gradient sends the relevance of a copy to its original."""
    inputs = state.trace.saved[node.index]
    if state.conservation is not None and node.fills:
        source = covered(node, dict(zip(node.inputs, inputs)))
        state.conservation.biased(r * ~source)
    leaves, output = _rerun(node, inputs)
    return gradients(output, leaves, r)


def _pad(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Padding: copied values hand relevance on; that of a filled border is kept, because no input belongs to it."""
    inputs = state.trace.saved[node.index]
    if state.conservation is not None:
        source = covered(node, dict(zip(node.inputs, inputs)))
        state.conservation.stabilised(source, r * ~source)
    leaves, output = _rerun(node, inputs)
    return gradients(output, leaves, r)


def _spread(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Pooling and resizing: R_i = a_i sum_j c_ij R_j / (z_j + e_j) with the operation's own coefficients c >= 0.

    Before the first linear layer the forward pass kept ones for the pixels: R_i = sum_j c_ij R_j / sum_i' c_i'j.
    """
    leaves, z = _rerun(node, state.trace.saved[node.index])
    s = divide(r, z.detach(), state.trace.config, state.conservation)
    return [a.detach() * c for a, c in zip(leaves, gradients(z, leaves, s))]


def _maxpool(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """Max pooling: the gradient, which gives all relevance to the maximum, or the average over the same windows."""
    if state.trace.config.pooling == "winner":
        return _route(state, node, r)
    return _spread(state, _averaged(node), r)


def _averaged(node: Node) -> Node:
    """The average pool over the windows of a max pool.

    Raises:
        InputError: the max pool is dilated, which an average pool cannot be.
    """
    call = node.call
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    arguments = {**dict(zip(names, call.args)), **call.kwargs}
    function = getattr(F, call.operation.replace("max", "avg"))
    if call.operation.startswith("adaptive"):
        return replace(node, call=replace(call, func=function, args=call.args[:2], kwargs={}, item=None))
    if arguments.get("dilation", 1) not in (1, (1, 1), [1, 1]):
        raise InputError(f"pooling='average' has no rule for the dilated max pool {node.label}; use pooling='winner'.")
    args = (
        arguments["input"],
        arguments["kernel_size"],
        arguments.get("stride"),
        arguments.get("padding", 0),
        arguments.get("ceil_mode", False),
    )
    return replace(node, call=replace(call, func=function, args=args, kwargs={}, item=None))


def _product(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """A product: everything to the factor beside a gate; one half to each of two factors that carry relevance.

    A divisor counts as a constant, as the deviation of a norm does.
    """
    message = r if len(node.flow) == 1 else r / 2
    return [_unbroadcast(message, state.trace, index) for index in node.flow]


def _matmul(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """A matrix product of two values that carry relevance."""
    trace, conservation = state.trace, state.conservation
    return products.messages(node, trace.saved[node.index], r, lambda r, z: divide(r, z, trace.config, conservation))


def _activation_offset(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """A function with a constant part f(0), which keeps its share as a bias does."""
    passed = r * state.trace.saved[node.index]
    if state.conservation is not None:
        state.conservation.biased(r - passed)
    return [passed]


def _normalisation(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """A norm whose deviation is a constant: relevance unchanged, or divided by LRP-epsilon (`norm="linear"`)."""
    if state.trace.config.norm == "identity":
        return [r]
    leaf, y, bias = normalisation.shares(node, state.trace.saved[node.index][0])
    s = divide(r, y.detach(), state.trace.config, state.conservation)
    if state.conservation is not None and bias is not None:
        state.conservation.biased(s * bias)
    return [normalisation.contributions(leaf, y, s)]


def _softmax(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """The softmax of attention under `softmax="attnlrp"`; what its expansion does not explain is a bias."""
    scores, shares = state.trace.saved[node.index]
    passed = products.softmax_of_scores(scores, shares, r, softmax_axis(node.call))
    if state.conservation is not None:
        state.conservation.biased(r - passed)
    return [passed]


def _maximum(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """The largest value, or the larger of two: the gradient, which ties share equally; a constant winner keeps it."""
    inputs = state.trace.saved[node.index]
    leaves, output = _rerun(with_shared_ties(node), inputs)
    if state.conservation is not None and node.call.constants:
        won = gradients(output, leaves, torch.ones_like(output))[0]
        state.conservation.biased(r * (1 - won))
    return [_unbroadcast(m, state.trace, i) for m, i in zip(gradients(output, leaves, r), node.flow)]


def _region(state: _Sweep, node: Node, r: Tensor) -> list[Tensor]:
    """The block rule: gradient x input of a whole region, R_i = x_i sum_j (dy_j / dx_i) R_j / (y_j + e_j)."""
    run: RegionRun = state.trace.saved[node.index]
    s = divide(r, run.output.detach(), state.trace.config, state.conservation)
    if state.conservation is not None and state.trace.config.block_weights == "signed":
        book_biases(state.conservation, node, run, s)
    return [run.entry.detach() * gradients(run.output, [run.entry], s)[0]]


BACKWARD: dict[str, Callable[[_Sweep, Node, Tensor], list[Tensor]]] = {
    **dict.fromkeys(("norm", "relu", "identity", "pass", "rescale", "activation"), _unchanged),
    **dict.fromkeys(("linear", "weighted"), _linear),
    "affine": _affine,
    **dict.fromkeys(("sum", "difference"), _sum),
    **dict.fromkeys(("product", "quotient"), _product),
    "matmul": _matmul,
    "activation_offset": _activation_offset,
    "normalisation": _normalisation,
    "softmax": _softmax,
    "maximum": _maximum,
    "route": _route,
    "pad": _pad,
    "spread": _spread,
    "maxpool": _maxpool,
    "region": _region,
}
_REPORTED = {
    "linear", "weighted", "affine", "sum", "difference", "pad", "spread", "maxpool", "region", "matmul",
    "activation_offset", "normalisation", "softmax", "maximum",
}  # fmt: skip
