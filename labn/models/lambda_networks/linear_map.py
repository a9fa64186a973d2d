"""The lambda layer as a linear map of its values, queries and normalised keys held constant."""

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
            here = last[:, :, row.start : row.stop, column.start : column.stop].flatten(1, 3)
            shape = (dim_u, row.last - row.first, column.last - column.first)
            reached = result[:, :, row.first : row.last, column.first : column.last]
            reached += (change(weights).mT @ here).unflatten(1, shape)
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


class LambdaWeights(Weights):
    """Y[h,v,n] = sum_{u,m} (sum_k Q[h,k,n] K[u,k,m] + P[h,n,u,m]) V[u,v,m] + sum_k Q[h,k,n] b[k].

    P[h,n,u,m] = sum_k Q[h,k,n] E[k,u,m-n] (Bello, ICLR 2021, eq. 1-3). The weights that rules of relevance propagation
    change are the Q[h,k,n] K[u,k,m], one for each key, and the P[h,n,u,m]: values reach the output through dk
    summaries of the whole map and, within the window, directly. As K >= 0, rho(Q K) = rho(Q) K; the sum over keys or of
    both paths could only be clamped for all pairs of positions. Neither A nor a lambda is ever held whole.

    Args:
        query: Q (B, heads, dk, H, W).
        key: K (B, du, dk, H, W), normalised over the positions.
        window: E (dk, du, r, r).
        bias: b (dk,) or None.
        dim_v: dv, values per head.
        formulation: how the position path of the forward pass is computed, see `labn.models.lambda_networks.position`.
        pool: identity or average pooling of Y, which belongs to the linear map: its windows divide relevance by the
            contributions to a window, not by the signed sums in it, which may cancel.

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
        """Y of V, pooled."""
        lambdas = content_lambdas(self.key, value)
        if self.bias is not None:
            lambdas = lambdas + self.bias[:, None].to(lambdas.dtype)
        window = self.window.to(value.dtype)
        position = position_path(self.query.to(value.dtype), window, value, self.formulation)
        return self.pool((apply_lambdas(lambdas, self.query) + position).flatten(1, 2))

    def apply(self, value: Tensor, transform: WeightTransform) -> Tensor:
        """The sum of both paths with their weights changed; under `Flat` every value of a channel has the weight 1."""
        query, key = self._content(transform)
        content = apply_lambdas(content_lambdas(key, value), query)
        whole = content if isinstance(transform, Flat) else content + self._position.sum(value, transform)
        return self.pool(whole.flatten(1, 2))

    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """The transposes of pooling and of the two paths."""
        s = self._unpool(s).unflatten(1, (self.query.shape[1], -1))
        query, key = self._content(transform)
        lambdas = query.transpose(1, 2).flatten(2, 4) @ s.movedim(2, -1).flatten(1, 3)
        content = (key.transpose(2, 1).flatten(2).mT @ lambdas).mT
        content = content.unflatten(2, (key.shape[1], *s.shape[-2:])).transpose(1, 2)
        return content if isinstance(transform, Flat) else content + self._position.spread(s, transform)

    def held(self) -> AbstractContextManager[None]:
        """All transforms of one rule share the products of queries and window."""
        return self._position.held()

    def offset(self) -> Tensor | None:
        """sum_k Q[h,k,n] b[k], pooled and the same for the dv values of a head."""
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
        """Two factors of the changed weights of the content path: rho(Q K) = rho(Q) K, as K >= 0."""
        if isinstance(transform, Flat):
            return torch.full_like(self.query, 1 / self.query.shape[2]), torch.ones_like(self.key)
        return transform(self.query), self.key


def content_lambdas(key: Tensor, value: Tensor) -> Tensor:
    """lambda_c[k,v] = sum_{u,m} K[u,k,m] V[u,v,m], (B, dk, dv)."""
    return torch.einsum("bukij,buvij->bkv", key, value)


def apply_lambdas(lambdas: Tensor, query: Tensor) -> Tensor:
    """Apply lambdas (B, dk, dv), the same at every position, to queries (B, heads, dk, H, W): (B, heads, dv, H, W)."""
    return (lambdas.mT.unsqueeze(1) @ query.flatten(3)).unflatten(3, query.shape[-2:])
