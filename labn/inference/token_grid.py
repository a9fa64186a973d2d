"""Tokens as feature maps: which of the tokens (B, N, K) of a transformer are the positions of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """The grid of positions among the tokens (B, N, K) of one layer.

    Attributes:
        rows, columns: the grid, row by row.
        prefix: number of tokens before it, such as a class token; further ones may follow it.

    Example:
        >>> tokens = torch.arange(5.0).view(1, 5, 1)
        >>> TokenGrid(2, 2, prefix=1).maps(tokens)
        tensor([[[[1., 2.],
                  [3., 4.]]]])
    """

    rows: int
    columns: int
    prefix: int = 0

    @property
    def end(self) -> int:
        """Number of the first token behind the grid."""
        return self.prefix + self.rows * self.columns

    def maps(self, tokens: Tensor) -> Tensor:
        """Feature maps (B, K, rows, columns) of tokens (B, N, K)."""
        return tokens[:, self.prefix : self.end].transpose(1, 2).unflatten(2, (self.rows, self.columns))

    def tokens(self, maps: Tensor, others: Tensor) -> Tensor:
        """Tokens (n, N, K) of maps (n, K, rows, columns), with the tokens outside of the grid from (1 or n, N, K)."""
        others = others.expand(len(maps), -1, -1)
        positions = maps.flatten(2).transpose(1, 2)
        return torch.cat([others[:, : self.prefix], positions, others[:, self.end :]], 1)

    def fits(self, count: int) -> bool:
        """Whether `count` tokens can hold the grid."""
        return self.prefix >= 0 and self.end <= count
