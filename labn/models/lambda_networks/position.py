"""The position path of the lambda layer in three formulations: one function at different speeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**29}
"""Size of the lambdas that are in memory at once, per core of a CPU or per GPU."""


def convolution(query: Tensor, window: Tensor, value: Tensor) -> Tensor:
    """lambda[k,v,n] = sum_{u,m} E[k,u,m-n] V[u,v,m], then y[h,v,n] = sum_k Q[h,k,n] lambda[k,v,n].

    The lambdas are computed for a few images at a time and used while they are in the cache. The backward pass computes
    them again, so that they take no memory in between. Half precision accumulates in float32. Shapes as in
    `position_path`.
    """
    # The gradients of E and V share one FFT of the incoming gradient; a convolution library would need the time of
    # several forward passes for each of them. Second derivatives use plain operations.
    return _Convolution.apply(query, window, value)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, window: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, window, value)
        result = torch.zeros_like(value[:, :1].expand(-1, query.shape[1], -1, -1, -1), dtype=_wide(value.dtype))
        with torch.autocast(value.device.type, enabled=False):
            for chunk in _chunks(query, value):
                _apply(result[chunk], query[chunk].to(result.dtype), lambdas(window, value[chunk]).to(result.dtype))
        return result.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx.saved_tensors, ctx.needs_input_grad, grad)
        query, window, value = ctx.saved_tensors
        with torch.autocast(value.device.type, enabled=False):
            return _gradients(query, window, value, grad)


def lambdas(window: Tensor, value: Tensor) -> Tensor:
    """Position lambdas (B, dv, dk, H, W) of values (B, du, dv, H, W)."""
    folded = F.conv2d(value.transpose(1, 2).flatten(0, 1), window, padding=window.shape[-1] // 2)
    return folded.unflatten(0, (len(value), value.shape[2]))


def fast_length(minimum: int) -> int:
    """The smallest length of at least `minimum` whose prime factors are 2, 3, 5 and 7, for which FFTs are fast.

    Example:
        >>> fast_length(11), fast_length(121)
        (12, 125)
    """
    rest = minimum
    for prime in (2, 3, 5, 7):
        while rest % prime == 0:
            rest //= prime
    return minimum if rest == 1 else fast_length(minimum + 1)


def _gradients(query: Tensor, window: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, window and value; correlations with the window are products of Fourier transforms."""
    # From length H + r // 2 + 1 on, circular wrapping only reaches rows that are cut off again.
    height, width = value.shape[-2:]
    r, reach, wide = window.shape[-1], window.shape[-1] // 2, _wide(value.dtype)
    size = tuple(fast_length(max(n + reach + 1, r)) for n in (height, width))
    window_f = torch.fft.rfft2(window.to(wide), size)
    d_query, d_value = torch.empty_like(query), torch.empty_like(value)
    d_window_f = torch.zeros_like(window_f)
    for chunk in _chunks(query, value):
        q, g = query[chunk].to(wide), grad[chunk].to(wide)
        lambda_ = lambdas(window, value[chunk]).to(wide)
        for head in range(q.shape[1]):
            d_query[chunk, head] = (g[:, head, :, None] * lambda_).sum(dim=1)
        d_lambda_f = torch.fft.rfft2(_outer(lambda_, q, g), size)
        value_f = torch.fft.rfft2(value[chunk].to(wide), size).conj()
        for u in range(value.shape[1]):
            d_window_f[:, u] += (d_lambda_f * value_f[:, u, :, None]).sum(dim=(0, 1))
            spread = torch.fft.irfft2((d_lambda_f * window_f[:, u]).sum(dim=2), size)
            d_value[chunk, u] = spread[..., reach : reach + height, reach : reach + width]
    d_window = torch.fft.irfft2(d_window_f.conj(), size).roll((reach, reach), dims=(-2, -1))[..., :r, :r]
    return d_query, d_window.to(window.dtype), d_value


def _differentiable_gradients(
    saved: tuple[Tensor, ...], needed: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    query, window, value = saved
    with torch.enable_grad():
        result = torch.einsum("bhkij,bvkij->bhvij", query, lambdas(window, value))
    inputs = [tensor for tensor, need in zip(saved, needed) if need]
    gradients = iter(torch.autograd.grad(result, inputs, grad, create_graph=True))
    return tuple(next(gradients) if need else None for need in needed)


def _apply(result: Tensor, query: Tensor, lambda_: Tensor) -> None:
    """Add sum_k Q[h,k,n] lambda[k,v,n] to `result` in place."""
    # Unlike `einsum`, `addcmul_` needs no permuted copy of the lambdas.
    for k in range(query.shape[2]):
        result.addcmul_(query[:, :, k, None], lambda_[:, None, :, k])


def _outer(out: Tensor, query: Tensor, grad: Tensor) -> Tensor:
    """Write the gradient of the lambdas, sum_h Q[h,k,n] g[h,v,n], into `out` (B, dv, dk, H, W)."""
    torch.mul(query[:, 0, None], grad[:, 0, :, None], out=out)
    for head in range(1, query.shape[1]):
        out.addcmul_(query[:, head, None], grad[:, head, :, None])
    return out


def _chunks(query: Tensor, value: Tensor) -> Iterator[slice]:
    """Slices of the batch, of at least one image, whose lambdas fit into the cores' caches or CHUNK_BYTES of a GPU."""
    image = value.shape[2] * query.shape[2] * value.shape[3] * value.shape[4] * _wide(value.dtype).itemsize
    cores = torch.get_num_threads() if value.device.type == "cpu" else 1
    step = max(1, cores * CHUNK_BYTES.get(value.device.type, 2**29) // image)
    return (slice(i, i + step) for i in range(0, len(value), step))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


TILE = 14
"""Side of a tile of queries."""


class Span(NamedTuple):
    """Queries [start, stop) along one axis and the keys [first, last) that they can reach."""

    start: int
    stop: int
    first: int
    last: int


def query_first(query: Tensor, window: Tensor, value: Tensor) -> Tensor:
    """S[h,n,m] = sum_k Q[h,k,n] E[k,u,m-n], then y[h,v,n] = sum_{u,m} S[h,n,m] V[u,v,m].

    This needs heads * (dk + dv) multiply-adds per pair (n, m) instead of dk * dv. Square tiles of queries are combined
    with the keys in the window's reach only. All operations are differentiable. Shapes as in `position_path`.
    """
    reach = window.shape[-1] // 2
    padded = F.pad(window, (TILE - 1,) * 4)
    rows = [
        torch.cat([_tile(query, padded, value, row, column, reach) for column in spans(query.shape[-1], reach)], dim=-1)
        for row in spans(query.shape[-2], reach)
    ]
    return torch.cat(rows, dim=-2)


def spans(size: int, reach: int, tile: int = TILE) -> Iterator[Span]:
    """Divide an axis into equal tiles of at most `tile` queries, each with the keys at most `reach` away."""
    count = -(-size // tile)
    edges = [round(i * size / count) for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield Span(start, stop, max(0, start - reach), min(size, stop + reach))


def reachable_keys(size: int, r: int) -> float:
    """Mean number of keys along an axis that a query's tile is combined with."""
    return sum((s.last - s.first) * (s.stop - s.start) for s in spans(size, r // 2)) / size


def _tile(query: Tensor, padded: Tensor, value: Tensor, row: Span, column: Span, reach: int) -> Tensor:
    """Result (B, heads, dv, height, width) of one tile."""
    tile = query[..., row.start : row.stop, column.start : column.stop]
    batch, heads, dim_k, height, width = tile.shape
    queries = tile.permute(3, 4, 0, 1, 2).reshape(height * width, batch * heads, dim_k)
    scores = queries @ _table(padded, row, column, reach)
    scores = scores.unflatten(1, (batch, heads)).permute(1, 2, 0, 3).reshape(batch, heads * height * width, -1)
    keys = value[..., row.first : row.last, column.first : column.last]
    result = scores @ keys.transpose(1, 2).flatten(2).mT
    return result.unflatten(1, (heads, height, width)).permute(0, 1, 4, 2, 3)


def _table(padded: Tensor, row: Span, column: Span, reach: int) -> Tensor:
    """E[k,u,m-n] (queries, dk, du * keys) for the queries n and keys (u, m) of a tile; 0 outside the window."""
    # `unfold` enumerates offsets m - n in increasing order, which is decreasing in n: hence the flips.
    windows = padded
    for axis, span in ((2, row), (3, column)):
        offset = span.first - (span.stop - 1) + reach + TILE - 1
        windows = windows.narrow(axis, offset, span.last - span.first + span.stop - span.start - 1)
        windows = windows.unfold(axis, span.last - span.first, 1)
    return windows.permute(2, 3, 0, 1, 4, 5).flip(0, 1).flatten(3).flatten(0, 1).flatten(2)


QUERY_FIRST_BELOW = 25.0
"""Ratio of the costs of `query_first` and `convolution`, in the units of `choose`, at which both take equally long."""


def position_path(query: Tensor, window: Tensor, value: Tensor, formulation: str = "auto") -> Tensor:
    """y[h,v,n] = sum_k Q[h,k,n] sum_{u,m} E[k,u,m-n] V[u,v,m] (Bello, ICLR 2021, eq. 3).

    Args:
        query: Q (B, heads, dk, H, W).
        window: E (dk, du, r, r); the offset 0 is at its centre.
        value: V (B, du, dv, H, W), zero outside the map; all three tensors have one dtype.
        formulation: a key of `FORMULATIONS`, or `auto` for the choice of `choose`.

    Returns:
        (B, heads, dv, H, W).
    """
    name = choose(query.shape, window.shape, value.shape) if formulation == "auto" else formulation
    return FORMULATIONS[name](query, window, value)


def choose(query: torch.Size, window: torch.Size, value: torch.Size) -> str:
    """The fastest formulation for these shapes (see `position_path`), equal on all devices."""
    # `query_first` costs about heads + dk / B operations for each key in a query's reach, and the convolution's cost
    # grows with dv; QUERY_FIRST_BELOW was measured on a CPU. Compilers cannot trace the hand-written gradient of
    # `convolution`, so that plain operations are compiled instead.
    if torch.compiler.is_exporting():  # for batches of any size, on which the choice below depends
        return "conv2d"
    batch, heads, dim_k = query[:3]
    keys = value[1] * reachable_keys(query[-2], window[-1]) * reachable_keys(query[-1], window[-1])
    if (heads + dim_k / max(batch, 1)) * keys <= QUERY_FIRST_BELOW * value[2]:
        return "query_first"
    return "conv2d" if torch.compiler.is_compiling() else "convolution"


def conv2d(query: Tensor, window: Tensor, value: Tensor) -> Tensor:
    """The definition: lambdas by a 2-D convolution, with the values folded into the batch, then applied to queries."""
    folded = value.transpose(1, 2).flatten(0, 1)
    lambdas = F.conv2d(folded, window, padding=window.shape[-1] // 2)
    lambdas = lambdas.unflatten(0, (-1, value.shape[2]))
    return torch.einsum("bhkij,bvkij->bhvij", query, lambdas)


FORMULATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conv2d": conv2d,
    "convolution": convolution,
    "query_first": query_first,
}
