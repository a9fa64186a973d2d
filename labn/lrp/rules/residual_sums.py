"""How a residual sum F + S divides relevance between its two branches (the splittings of ECCV 2024 and others)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.lrp.tracing.graph import Graph, Node


@dataclass(frozen=True)
class ResidualSum:
    """A residual sum F + S.

    Attributes:
        deep: position (0 or 1) of F, the branch with more linear layers, among the inputs; S is the other one.
        identity: whether S is an identity shortcut: no linear layer lies between the block's input and the sum.
    """

    deep: int
    identity: bool

    @property
    def skip(self) -> int:
        """Position (0 or 1) of S."""
        return 1 - self.deep


def shares_by_size(f: Tensor, s: Tensor) -> Tensor:
    """|F| / (|F| + |S|), and 1/2 where both are zero."""
    f, s = torch.broadcast_tensors(f, s)
    # In place on one new tensor: feature maps are large, and the share is needed for every one of their values.
    size = f.abs()
    return size.div_(s.abs().add_(size)).nan_to_num_(nan=0.5)


def _ratio(f: Tensor, s: Tensor, residual_sum: ResidualSum) -> Tensor:
    return shares_by_size(f, s)


def _symmetric(f: Tensor, s: Tensor, residual_sum: ResidualSum) -> Tensor:
    return f.new_full((), 0.5)


def _ratio_down(f: Tensor, s: Tensor, residual_sum: ResidualSum) -> Tensor:
    return f.new_ones(()) if residual_sum.identity else shares_by_size(f, s)


def _symmetric_down(f: Tensor, s: Tensor, residual_sum: ResidualSum) -> Tensor:
    return f.new_full((), 1.0 if residual_sum.identity else 0.5)


def _signed(f: Tensor, s: Tensor, residual_sum: ResidualSum) -> Tensor:
    total = f + s
    # F = -S cancels: halves, because the quotient has no limit there.
    return torch.where(total == 0, 0.5, f / torch.where(total == 0, 1, total))


# The share of R that F receives; S receives the rest, so that the two always add up to R.
SHARES: dict[str, Callable[[Tensor, Tensor, ResidualSum], Tensor]] = {
    "ratio": _ratio,
    "symmetric": _symmetric,
    "ratio_down": _ratio_down,
    "symmetric_down": _symmetric_down,
    "signed": _signed,
    "block": _ratio,  # for sums that are not part of a region
}


def residual_sum_of(node: Node, graph: Graph) -> ResidualSum:
    """The roles of the two inputs of a sum: F is the one with more linear layers since their last common ancestor."""
    ancestors = [_depths(index, graph) for index in node.inputs]
    common = max(set(ancestors[0]) & set(ancestors[1]), default=0)
    depths = [layers.get(common, 0) for layers in ancestors]
    # Ties go to the first operand, as both branches are equally deep.
    deep = 0 if depths[0] >= depths[1] else 1
    return ResidualSum(deep, identity=min(depths) == 0)


def _depths(index: int, graph: Graph) -> dict[int, int]:
    """Ancestor of `index` -> the largest number of linear layers on a path from it to `index`."""
    depths = {index: 0}
    for current in sorted(graph.nodes, reverse=True):
        if current in depths:
            below = depths[current] + (graph.nodes[current].kind in ("linear", "weighted", "matmul"))
            for source in graph.nodes[current].flow:
                depths[source] = max(depths.get(source, 0), below)
    return depths
