"""The lambda layer as a linear map of its values, with queries and normalised keys as constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labn.lrp.weight_transforms import Flat, WeightTransform
from labn.lrp.weighted_product import Weights
from labn.models.lambda_networks.position import Span, position_path, spans

TILE = 7
"""Side of a tile of queries."""

KEPT_BYTES = 2**27
"""Largest size of the tiles that `held` keeps."""

Change = Callable[[Tensor], Tensor]


class Tile(NamedTuple):
    """Weights P (B, heads * n, du * m) between the queries (h, n) of a tile and the keys (u, m) in their reach."""

    row: Span
    column: Span
    weights: Tensor


class PositionWeights:
    """The weights P of a batch, computed tile by tile: square tiles of queries with the keys in the window's reach.

    Args:
        query: Q (B, heads, dk, H, W).
        window: E (dk, du, r, r); the offset 0 is at its centre.
    """

    # P has (heads * H * W) x (du * H * W) entries per image and would not fit into memory as a whole.

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
            here = last[:, :, row.start : row.stop, column.start : column.stop].flatten(1, 3)
            shape = (dim_u, row.last - row.first, column.last - column.first)
            reached = result[:, :, row.first : row.last, column.first : column.last]
            reached += (change(weights).mT @ here).unflatten(1, shape)
        return result.movedim(-1, 2)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the tiles in memory inside the block, if they take at most KEPT_BYTES."""
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
    """Shift the window of query (i, j) by (i, j): (B, heads, a, b, du, r, s) -> (B, heads, a, b, du, a+r-1, b+s-1)."""
    _, _, rows, columns, _, r, s = weights.shape
    canvas = weights.new_zeros(*weights.shape[:5], rows + r - 1, columns + s - 1)
    strides = list(canvas.stride())
    # One step along the query axis is also one step along the key axis: a single strided copy shifts all windows.
    strides[2], strides[3] = strides[2] + strides[5], strides[3] + strides[6]
    canvas.as_strided(weights.shape, strides).copy_(weights)
    return canvas


class LambdaWeights(Weights):
    """Y[h,v,n] = sum_{u,m} (sum_k Q[h,k,n] K[u,k,m] + P[h,n,u,m]) V[u,v,m] + sum_k Q[h,k,n] b[k].

    P[h,n,u,m] = sum_k Q[h,k,n] E[k,u,m-n] (Bello, ICLR 2021, eq. 1-3). Rules of relevance propagation transform the
    weights Q[h,k,n] K[u,k,m] of the content path, one for each k, and the weights P[h,n,u,m] of the position path. As
    K >= 0, rho(Q K) = rho(Q) K. Transforming their sums instead would need a matrix of all pairs of positions.

    Args:
        query: Q (B, heads, dk, H, W).
        key: K (B, du, dk, H, W), normalised over the positions.
        window: E (dk, du, r, r).
        bias: b (dk,) or None.
        dim_v: dv, values per head.
        formulation: computation of the position path in the forward pass, see `labn.models.lambda_networks.position`.
        pool: identity or average pooling of Y, as part of the linear map. Relevance is then divided in proportion to
            all contributions to a pooling window, and not to the signed sums in it, which may cancel.

    Values (B, du, dv, H, W) become outputs (B, heads * dv, H', W'), head by head.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        window: Tensor,
        bias: Tensor | None,
        dim_v: int,
        formulation: str,
        pool: nn.Module,
    ) -> None:
        self.query, self.key, self.window, self.bias = query, key, window, bias
        self.dim_v, self.formulation, self.pool = dim_v, formulation, pool

    def __call__(self, value: Tensor) -> Tensor:
        """Compute Y from V, pooled."""
        lambdas = content_lambdas(self.key, value)
        if self.bias is not None:
            lambdas = lambdas + self.bias[:, None].to(lambdas.dtype)
        window = self.window.to(value.dtype)
        position = position_path(self.query.to(value.dtype), window, value, self.formulation)
        return self.pool((apply_lambdas(lambdas, self.query) + position).flatten(1, 2))

    def apply(self, value: Tensor, transform: WeightTransform) -> Tensor:
        """Compute both paths with transformed weights; with `Flat`, every value of a channel has the weight 1."""
        query, key = self._content(transform)
        content = apply_lambdas(content_lambdas(key, value), query)
        whole = content if isinstance(transform, Flat) else content + self._position.sum(value, transform)
        return self.pool(whole.flatten(1, 2))

    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """Apply the transposes of the pooling and of both paths."""
        s = self._unpool(s).unflatten(1, (self.query.shape[1], -1))
        query, key = self._content(transform)
        lambdas = query.transpose(1, 2).flatten(2, 4) @ s.movedim(2, -1).flatten(1, 3)
        content = (key.transpose(2, 1).flatten(2).mT @ lambdas).mT
        content = content.unflatten(2, (key.shape[1], *s.shape[-2:])).transpose(1, 2)
        return content if isinstance(transform, Flat) else content + self._position.spread(s, transform)

    def held(self) -> AbstractContextManager[None]:
        """Compute the products of queries and window once for all transforms of a rule."""
        return self._position.held()

    def offset(self) -> Tensor | None:
        """The offset sum_k Q[h,k,n] b[k], pooled and repeated for the dv values of a head; None without a bias."""
        if self.bias is None:
            return None
        offset = self.pool(torch.einsum("bhkij,k->bhij", self.query, self.bias))
        return offset.repeat_interleave(self.dim_v, 1)

    @cached_property
    def _position(self) -> PositionWeights:
        return PositionWeights(self.query, self.window)

    def _unpool(self, s: Tensor) -> Tensor:
        """The gradient of the pooling, linear in s (T, d, H', W')."""
        leaf = s.new_zeros(*s.shape[:2], *self.query.shape[-2:]).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.pool(leaf), leaf, s)[0]

    def _content(self, transform: WeightTransform) -> tuple[Tensor, Tensor]:
        """The factors rho(Q) and K of the transformed weights of the content path."""
        if isinstance(transform, Flat):
            return torch.full_like(self.query, 1 / self.query.shape[2]), torch.ones_like(self.key)
        return transform(self.query), self.key


def content_lambdas(key: Tensor, value: Tensor) -> Tensor:
    """Content lambdas (B, dk, dv): lambda_c[k,v] = sum_{u,m} K[u,k,m] V[u,v,m]."""
    return torch.einsum("bukij,buvij->bkv", key, value)


def apply_lambdas(lambdas: Tensor, query: Tensor) -> Tensor:
    """Apply lambdas (B, dk, dv), common to all positions, to queries (B, heads, dk, H, W): (B, heads, dv, H, W)."""
    return (lambdas.mT.unsqueeze(1) @ query.flatten(3)).unflatten(3, query.shape[-2:])
