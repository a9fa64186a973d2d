"""Products of two values that both carry relevance, and the softmax of attention (AttnLRP, Achtibat et al., ICML 2024).

A product is an elementwise one, such as a gated linear unit, or a matrix product. By the uniform rule each factor
receives one half: R_ji = 1/2 a_ij b_jk R_ik / (z_ik + e), summed over the outputs that the factor contributes to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from labn.lrp.rules.linear_layers import gradients
from labn.lrp.tracing.graph import Node


def halved(node: Node, values: dict[int, Tensor]) -> Tensor:
    """The product as a function of degree one: (a b' + a' b) / 2, where a' and b' are constants equal to a and b.

    Value times gradient of it is one half of the product for each factor.
    """
    if len(node.inputs) == 1:  # a square, whose gradient counts both factors
        (only,) = node.inputs
        return (node.evaluate({only: values[only]}) + node.evaluate({only: values[only].detach()})) / 2
    first, second = node.inputs
    left = node.evaluate({first: values[first], second: values[second].detach()})
    right = node.evaluate({first: values[first].detach(), second: values[second]})
    return (left + right) / 2


def messages(node: Node, inputs: list[Tensor], r: Tensor, divide: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """The relevance of each factor of a matrix product.

    Args:
        node: the product.
        inputs: its factors.
        r: relevance at the product.
        divide: s = R / (z + e) from R and z.
    """
    values = {index: a.detach().requires_grad_() for index, a in zip(node.inputs, inputs)}
    with torch.enable_grad():
        z = halved(node, values)
    leaves = [values[index] for index in node.flow]
    s = divide(r, z.detach())
    return [a.detach() * c for a, c in zip(leaves, gradients(z, leaves, s))]


def softmax_of_scores(x: Tensor, s: Tensor, r: Tensor, axis: int) -> Tensor:
    """R_i = x_i (R_i - s_i sum_j R_j): the first-order expansion of the softmax s of the scores x along an axis.

    Scores of minus infinity, which a mask leaves out, receive nothing.
    """
    finite = torch.where(x.isfinite(), x, 0)
    return finite * (r - s * r.sum(axis, keepdim=True))
