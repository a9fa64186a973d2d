"""The lambda layer as a linear map of its values, queries and normalised keys held constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from labn.models.lambda_position import position_path
from labn.models.lambda_query_first import Span, spans
from labn.weighted import Weights, part_of

TILE = 7


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
        formulation: how the position path of the forward pass is computed, see `labn.models.lambda_position`.
        pool: identity or average pooling of Y, a part of the linear map: its windows share relevance out by what they
            were given, not by signed sums of it, which may cancel.

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

    def apply(self, value: Tensor, part: str) -> Tensor:
        """The sum of both paths with their weights changed; `flat` gives each value of a channel the weight 1."""
        query, key = self._content(part)
        content = apply_lambdas(content_lambdas(key, value), query)
        whole = content if part == "flat" else content + _window_sum(self.query, self.window, value, part_of(part))
        return self.pool(whole.flatten(1, 2))

    def adjoint(self, s: Tensor, part: str) -> Tensor:
        """The transposes of pooling and of the two paths."""
        s = self._unpool(s).unflatten(1, (self.query.shape[1], -1))
        query, key = self._content(part)
        lambdas = query.transpose(1, 2).flatten(2, 4) @ s.movedim(2, -1).flatten(1, 3)
        content = (key.transpose(2, 1).flatten(2).mT @ lambdas).mT
        content = content.unflatten(2, (key.shape[1], *s.shape[-2:])).transpose(1, 2)
        return content if part == "flat" else content + _window_spread(self.query, self.window, s, part_of(part))

    def offset(self) -> Tensor | None:
        """sum_k Q[h,k,n] b[k], pooled and the same for the dv values of a head."""
        if self.bias is None:
            return None
        offset = self.pool(torch.einsum("bhkij,k->bhij", self.query, self.bias))
        return offset.repeat_interleave(self.dim_v, 1)

    def _unpool(self, s: Tensor) -> Tensor:
        """The gradient of the pooling, linear in s (T, d, H', W')."""
        leaf = s.new_zeros(*s.shape[:2], *self.query.shape[-2:]).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.pool(leaf), leaf, s)[0]

    def _content(self, part: str) -> tuple[Tensor, Tensor]:
        """Two factors of the changed weights of the content path: rho(Q K) = rho(Q) K, as K >= 0."""
        if part == "flat":
            return torch.full_like(self.query, 1 / self.query.shape[2]), torch.ones_like(self.key)
        return part_of(part)(self.query), self.key


def content_lambdas(key: Tensor, value: Tensor) -> Tensor:
    """lambda_c[k,v] = sum_{u,m} K[u,k,m] V[u,v,m], (B, dk, dv)."""
    return torch.einsum("bukij,buvij->bkv", key, value)


def apply_lambdas(lambdas: Tensor, query: Tensor) -> Tensor:
    """Apply lambdas (B, dk, dv), the same at every position, to queries (B, heads, dk, H, W): (B, heads, dv, H, W)."""
    return (lambdas.mT.unsqueeze(1) @ query.flatten(3)).unflatten(3, query.shape[-2:])


def _window_sum(query: Tensor, window: Tensor, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """sum_{u,m} rho(P[h,n,u,m]) V[u,v,m], tile by tile of the queries n."""
    last = value.movedim(2, -1)
    result = query.new_empty(max(len(query), len(value)), query.shape[1], *query.shape[-2:], value.shape[2])
    for row, column, weights in _tiles(query, window, change):
        keys = last[:, :, row.first : row.last, column.first : column.last].flatten(1, 3)
        shape = (query.shape[1], row.stop - row.start, column.stop - column.start)
        result[:, :, row.start : row.stop, column.start : column.stop] = (weights @ keys).unflatten(1, shape)
    return result.movedim(-1, 2)


def _window_spread(query: Tensor, window: Tensor, s: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The transpose of `_window_sum`: sum_{h,n} rho(P[h,n,u,m]) s[h,v,n]."""
    last = s.movedim(2, -1)
    result = s.new_zeros(len(s), window.shape[1], *s.shape[-2:], s.shape[2])
    for row, column, weights in _tiles(query, window, change):
        part = last[:, :, row.start : row.stop, column.start : column.stop].flatten(1, 3)
        shape = (window.shape[1], row.last - row.first, column.last - column.first)
        reached = result[:, :, row.first : row.last, column.first : column.last]
        reached += (weights.mT @ part).unflatten(1, shape)
    return result.movedim(-1, 2)


def _tiles(query: Tensor, window: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[tuple[Span, Span, Tensor]]:
    """rho(P) between a tile's queries (h, n) and the keys (u, m) that they reach, (B, heads * n, du * m)."""
    height, width = query.shape[-2:]
    middle = window.shape[-1] // 2
    reach = [min(middle, size - 1) for size in (height, width)]
    inner = window[..., middle - reach[0] : middle + reach[0] + 1, middle - reach[1] : middle + reach[1] + 1]
    for row in spans(height, reach[0], TILE):
        for column in spans(width, reach[1], TILE):
            queries = query[..., row.start : row.stop, column.start : column.stop].movedim(2, -1)
            weights = change(queries @ inner.to(query.dtype).flatten(1)).unflatten(-1, inner.shape[1:])
            placed = _place(weights)
            up, left = (span.first - span.start + r for span, r in zip((row, column), reach))
            placed = placed[..., up : up + row.last - row.first, left : left + column.last - column.first]
            yield row, column, placed.flatten(4).flatten(1, 3)


def _place(weights: Tensor) -> Tensor:
    """Move the window (B, heads, a, b, du, r, s) of query (i, j) by (i, j): (B, heads, a, b, du, a+r-1, b+s-1)."""
    _, _, rows, columns, _, r, s = weights.shape
    canvas = weights.new_zeros(*weights.shape[:5], rows + r - 1, columns + s - 1)
    strides = list(canvas.stride())
    strides[2], strides[3] = strides[2] + strides[5], strides[3] + strides[6]
    canvas.as_strided(weights.shape, strides).copy_(weights)
    return canvas
