"""Elementwise functions: the epsilon rule of z = (f(x) / x) x hands relevance on (AttnLRP, Achtibat et al., ICML 2024).

A function with f(0) = 0 hands on all of it. The constant part f(0) of another function, such as a sigmoid that is used
as a value, is a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labn.lrp.config import Config
from labn.lrp.rules.residual_sums import shares_by_size
from labn.lrp.tracing.graph import Node


def at_zero(node: Node, like: Tensor) -> Tensor:
    """f(0), one value per sample position, in the shape (1, ...) of the argument `like` (B, ...)."""
    return node.evaluate({node.flow[0]: torch.zeros_like(like[:1])})


def share_of_argument(node: Node, x: Tensor, config: Config) -> Tensor:
    """The share of f(x) = (f(x) - f(0)) + f(0) that the argument x (B, ...) receives; f(0) receives the rest.

    The shares are those of a residual sum: |f(x) - f(0)| / (|f(x) - f(0)| + |f(0)|), or with `residual="signed"`
    (f(x) - f(0)) / f(x). For f(x) >= f(0) >= 0 both are the same.
    """
    constant = at_zero(node, x)
    value = node.evaluate({node.flow[0]: x})
    if config.residual != "signed":
        return shares_by_size(value - constant, constant.expand_as(value))
    return torch.where(value == 0, 0.5, (value - constant) / torch.where(value == 0, 1, value))


def slope(node: Node, x: Tensor) -> Tensor:
    """(f(x) - f(0)) / x for x (B, ...), and 0 at x = 0."""
    rise = node.evaluate({node.flow[0]: x}) - at_zero(node, x)
    return torch.where(x == 0, 0, rise / torch.where(x == 0, 1, x))


def secant(node: Node, x: Tensor) -> Tensor:
    """f(x) as an affine function of x (B, ...), whose slope counts as a constant."""
    return x * slope(node, x.detach()) + at_zero(node, x.detach())
