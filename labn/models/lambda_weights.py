"""The lambda layer as a linear map of its values, queries and normalised keys held constant."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from labn.models.lambda_position import position_path
from labn.models.lambda_window import PositionWeights
from labn.weighted import Weights, part_of


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
        whole = content if part == "flat" else content + self._position.sum(value, part_of(part))
        return self.pool(whole.flatten(1, 2))

    def adjoint(self, s: Tensor, part: str) -> Tensor:
        """The transposes of pooling and of the two paths."""
        s = self._unpool(s).unflatten(1, (self.query.shape[1], -1))
        query, key = self._content(part)
        lambdas = query.transpose(1, 2).flatten(2, 4) @ s.movedim(2, -1).flatten(1, 3)
        content = (key.transpose(2, 1).flatten(2).mT @ lambdas).mT
        content = content.unflatten(2, (key.shape[1], *s.shape[-2:])).transpose(1, 2)
        return content if part == "flat" else content + self._position.spread(s, part_of(part))

    def held(self) -> AbstractContextManager[None]:
        """The parts that a rule asks for have the products of queries and window in common."""
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
