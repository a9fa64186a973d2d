"""Position path, query first: attention without softmax, as matrix products over tiles of queries."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 14


class Span(NamedTuple):
    """Queries [start, stop) along one axis and the keys [first, last) that they can reach."""

    start: int
    stop: int
    first: int
    last: int


def query_first(query: Tensor, window: Tensor, value: Tensor) -> Tensor:
    """S[h,n,m] = sum_k Q[h,k,n] E[k,u,m-n], then y[h,v,n] = sum_{u,m} S[h,n,m] V[u,v,m].

    That is heads * (dk + dv) multiply-adds per pair (n, m) instead of dk * dv. Square tiles of queries meet only the
    keys within the window's reach. Plain differentiable operations; shapes as in `labn.models.lambda_position`.
    """
    reach = window.shape[-1] // 2
    padded = F.pad(window, (TILE - 1,) * 4)
    rows = [
        torch.cat([_tile(query, padded, value, row, column, reach) for column in spans(query.shape[-1], reach)], dim=-1)
        for row in spans(query.shape[-2], reach)
    ]
    return torch.cat(rows, dim=-2)


def spans(size: int, reach: int, tile: int = TILE) -> Iterator[Span]:
    """Cut an axis into equal tiles of at most `tile` queries, with the keys at most `reach` away."""
    count = -(-size // tile)
    edges = [round(i * size / count) for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield Span(start, stop, max(0, start - reach), min(size, stop + reach))


def reachable_keys(size: int, r: int) -> float:
    """Mean number of keys along an axis that the tile of a query works on."""
    return sum((s.last - s.first) * (s.stop - s.start) for s in spans(size, r // 2)) / size


def _tile(query: Tensor, padded: Tensor, value: Tensor, row: Span, column: Span, reach: int) -> Tensor:
    """The tile's result, (B, heads, dv, height, width)."""
    part = query[..., row.start : row.stop, column.start : column.stop]
    batch, heads, dim_k, height, width = part.shape
    queries = part.permute(3, 4, 0, 1, 2).reshape(height * width, batch * heads, dim_k)
    scores = queries @ _table(padded, row, column, reach)
    scores = scores.unflatten(1, (batch, heads)).permute(1, 2, 0, 3).reshape(batch, heads * height * width, -1)
    keys = value[..., row.first : row.last, column.first : column.last]
    result = scores @ keys.transpose(1, 2).flatten(2).mT
    return result.unflatten(1, (heads, height, width)).permute(0, 1, 4, 2, 3)


def _table(padded: Tensor, row: Span, column: Span, reach: int) -> Tensor:
    """E[k,u,m-n] for the tile's queries n and its keys (u, m): (queries, dk, du * keys), 0 beyond the window.

    Offsets shrink as n grows, hence the flips.
    """
    windows = padded
    for axis, span in ((2, row), (3, column)):
        offset = span.first - (span.stop - 1) + reach + TILE - 1
        windows = windows.narrow(axis, offset, span.last - span.first + span.stop - span.start - 1)
        windows = windows.unfold(axis, span.last - span.first, 1)
    return windows.permute(2, 3, 0, 1, 4, 5).flip(0, 1).flatten(3).flatten(0, 1).flatten(2)
