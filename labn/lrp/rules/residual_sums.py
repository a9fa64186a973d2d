"""How a sum F + S shares its relevance between the two branches (ECCV 2024's splittings and their rivals)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.lrp.tracing.graph import Graph, Node


@dataclass(frozen=True)
class ResidualSum:
    """A residual sum as the rules see it.

    Attributes:
        deep: which of the two inputs (0 or 1) is F, the branch with more layers; the other one is S.
        identity: S is the block's input itself, no linear layer in between.
    """

    deep: int
    identity: bool

    @property
    def skip(self) -> int:
        """Which input is S."""
        return 1 - self.deep


def shares_by_size(f: Tensor, s: Tensor) -> Tensor:
    """|F| / (|F| + |S|), and 1/2 where both are zero."""
    f, s = torch.broadcast_tensors(f, s)
    size = f.abs()
    return size.div_(s.abs().add_(size)).nan_to_num_(nan=0.5)


def _ratio(f: Tensor, s: Tensor, junction: ResidualSum) -> Tensor:
    return shares_by_size(f, s)


def _symmetric(f: Tensor, s: Tensor, junction: ResidualSum) -> Tensor:
    return f.new_full((), 0.5)


def _ratio_down(f: Tensor, s: Tensor, junction: ResidualSum) -> Tensor:
    return f.new_ones(()) if junction.identity else shares_by_size(f, s)


def _symmetric_down(f: Tensor, s: Tensor, junction: ResidualSum) -> Tensor:
    return f.new_full((), 1.0 if junction.identity else 0.5)


def _signed(f: Tensor, s: Tensor, junction: ResidualSum) -> Tensor:
    total = f + s
    return torch.where(total == 0, 0.5, f / torch.where(total == 0, 1, total))


# The share of R that F receives; S receives the rest, so that the two always add up to R.
SHARES: dict[str, Callable[[Tensor, Tensor, ResidualSum], Tensor]] = {
    "ratio": _ratio,
    "symmetric": _symmetric,
    "ratio_down": _ratio_down,
    "symmetric_down": _symmetric_down,
    "signed": _signed,
    "block": _ratio,
}


def residual_sum_of(node: Node, graph: Graph) -> ResidualSum:
    """Which operand of a sum is the deep branch: the one with more linear layers since the branches parted."""
    ancestors = [_depths(index, graph) for index in node.inputs]
    common = max(set(ancestors[0]) & set(ancestors[1]), default=0)
    depths = [found.get(common, 0) for found in ancestors]
    deep = 0 if depths[0] >= depths[1] else 1
    return ResidualSum(deep, identity=min(depths) == 0)


def _depths(index: int, graph: Graph) -> dict[int, int]:
    """For every value upstream of `index`: the largest number of linear layers on a path from it to `index`."""
    depths = {index: 0}
    for current in sorted(graph.nodes, reverse=True):
        if current in depths:
            below = depths[current] + (graph.nodes[current].kind in ("linear", "weighted"))
            for source in graph.nodes[current].flow:
                depths[source] = max(depths.get(source, 0), below)
    return depths
