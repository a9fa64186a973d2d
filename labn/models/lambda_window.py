"""Position weights of a lambda layer, P[h,n,u,m] = sum_k Q[h,k,n] E[k,u,m-n], applied with their entries changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from labn.models.lambda_query_first import Span, spans

TILE = 7
KEPT_BYTES = 2**27

Change = Callable[[Tensor], Tensor]


class Tile(NamedTuple):
    """P between a tile's queries (h, n) and the keys (u, m) that they reach: weights (B, heads * n, du * m)."""

    row: Span
    column: Span
    weights: Tensor


class PositionWeights:
    """P of some images, never whole: square tiles of queries meet only the keys within the window's reach.

    Args:
        query: Q (B, heads, dk, H, W).
        window: E (dk, du, r, r), its centre the offset 0.
    """

    def __init__(self, query: Tensor, window: Tensor) -> None:
        self.query = query
        middle = window.shape[-1] // 2
        up, left = self._reach = [min(middle, size - 1) for size in query.shape[-2:]]
        self._inner = window[..., middle - up : middle + up + 1, middle - left : middle + left + 1].to(query.dtype)
        self._kept: list[Tile] | None = None

    def sum(self, value: Tensor, change: Change) -> Tensor:
        """sum_{u,m} rho(P[h,n,u,m]) V[u,v,m] of values (B, du, dv, H, W), with rho(0) = 0: (B, heads, dv, H, W)."""
        last = value.movedim(2, -1)
        count, heads = max(len(self.query), len(value)), self.query.shape[1]
        result = value.new_empty(count, heads, *value.shape[-2:], value.shape[2])
        for row, column, weights in self._tiles():
            keys = last[:, :, row.first : row.last, column.first : column.last].flatten(1, 3)
            shape = (heads, row.stop - row.start, column.stop - column.start)
            summed = (change(weights) @ keys).unflatten(1, shape)
            result[:, :, row.start : row.stop, column.start : column.stop] = summed
        return result.movedim(-1, 2)

    def spread(self, s: Tensor, change: Change) -> Tensor:
        """The transpose of `sum`: sum_{h,n} rho(P[h,n,u,m]) s[h,v,n], (B, heads, dv, H, W) -> (B, du, dv, H, W)."""
        last, dim_u = s.movedim(2, -1), self._inner.shape[1]
        result = s.new_zeros(max(len(self.query), len(s)), dim_u, *s.shape[-2:], s.shape[2])
        for row, column, weights in self._tiles():
            part = last[:, :, row.start : row.stop, column.start : column.stop].flatten(1, 3)
            shape = (dim_u, row.last - row.first, column.last - column.first)
            reached = result[:, :, row.first : row.last, column.first : column.last]
            reached += (change(weights).mT @ part).unflatten(1, shape)
        return result.movedim(-1, 2)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the tiles for what is asked within, where they take at most KEPT_BYTES."""
        self._kept = [] if self._bytes() <= KEPT_BYTES else None
        try:
            yield
        finally:
            self._kept = None

    def _tiles(self) -> Iterator[Tile]:
        if self._kept:
            yield from self._kept
            return
        kept: list[Tile] = []
        for row in self._spans(0):
            for column in self._spans(1):
                tile = Tile(row, column, self._between(row, column))
                if self._kept is not None:
                    kept.append(tile)
                yield tile
        self._kept = None if self._kept is None else kept

    def _spans(self, axis: int) -> Iterator[Span]:
        return spans(self.query.shape[3 + axis], self._reach[axis], TILE)

    def _bytes(self) -> int:
        pairs = [sum((s.stop - s.start) * (s.last - s.first) for s in self._spans(axis)) for axis in (0, 1)]
        images_and_heads = len(self.query) * self.query.shape[1]
        return images_and_heads * self._inner.shape[1] * pairs[0] * pairs[1] * self.query.element_size()

    def _between(self, row: Span, column: Span) -> Tensor:
        queries = self.query[..., row.start : row.stop, column.start : column.stop].movedim(2, -1)
        placed = _place((queries @ self._inner.flatten(1)).unflatten(-1, self._inner.shape[1:]))
        up, left = (span.first - span.start + reach for span, reach in zip((row, column), self._reach))
        placed = placed[..., up : up + row.last - row.first, left : left + column.last - column.first]
        return placed.flatten(4).flatten(1, 3)


def _place(weights: Tensor) -> Tensor:
    """Move the window (B, heads, a, b, du, r, s) of query (i, j) by (i, j): (B, heads, a, b, du, a+r-1, b+s-1)."""
    _, _, rows, columns, _, r, s = weights.shape
    canvas = weights.new_zeros(*weights.shape[:5], rows + r - 1, columns + s - 1)
    strides = list(canvas.stride())
    strides[2], strides[3] = strides[2] + strides[5], strides[3] + strides[6]
    canvas.as_strided(weights.shape, strides).copy_(weights)
    return canvas
