"""Attention rollout through a transformer, and, as an experiment, through a lambda network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.explainers.cam.features import fast_logits
from labn.explainers.cam.target_layer import watching
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import logits_of
from labn.models.lambda_networks.layer import LambdaLayer

MAX_PREFIX = 16  # class, distillation and register tokens in front of the patches


def rollout(attentions: Iterable[Tensor]) -> Tensor:
    """A^_L ... A^_1 with A^ = rownorm(A / 2 + I / 2) (Abnar and Zuidema, ACL 2020, section 3).

    Args:
        attentions: (B, N, N) non-negative matrices, the first layer first; row n says what token n attends to.

    Returns:
        (B, N, N), rows that sum to 1.
    """
    result: Tensor | None = None
    for attention in attentions:
        mixed = attention / 2 + torch.eye(attention.shape[-1], device=attention.device, dtype=attention.dtype) / 2
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        result = mixed if result is None else mixed @ result
    if result is None:
        raise InputError("rollout needs the attention of at least one layer.")
    return result


class _Recorder(TorchFunctionMode):
    """Sees every self-attention matrix that a model computes, mean over heads, however the model computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(self, func, args, dict(kwargs or {}))

    def record(self, attention: Tensor) -> None:
        """Keep a (B, heads, N, N) matrix; anything that is not square in tokens is no self-attention."""
        if attention.ndim == 4 and attention.shape[-1] == attention.shape[-2]:
            self.attentions.append(attention.mean(dim=1))


def _fused(recorder: _Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`F.scaled_dot_product_attention`: its matrix is not returned, so it is computed beside it."""
    query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    recorder.record(scores.softmax(dim=-1))
    return func(*args, **kwargs)


def _plain(recorder: _Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A softmax over a square matrix."""
    output = func(*args, **kwargs)
    recorder.record(output)
    return output


def _multi_head(recorder: _Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's own multi-head attention, which returns its matrices if asked."""
    wanted = {**kwargs, "need_weights": True, "average_attn_weights": False}
    output, attention = func(*args, **wanted)
    recorder.record(attention)
    return output, None


HANDLERS: dict[Any, Callable[[_Recorder, Any, Any, dict[str, Any]], Any]] = {
    F.scaled_dot_product_attention: _fused,
    F.softmax: _plain,
    torch.softmax: _plain,
    Tensor.softmax: _plain,
    F.multi_head_attention_forward: _multi_head,
}


def token_grid(tokens: int, size: torch.Size, embeddings: Sequence[tuple[int, int]] = ()) -> tuple[int, int, int]:
    """Rows, columns and prefix tokens of N tokens.

    The grid is what one of the model's convolutions made patches on, the finest of at most N of them, or without such a
    one as the image's proportions say.

    Args:
        tokens: N.
        size: (H, W) of the image.
        embeddings: rows and columns of what the model's convolutions returned.

    Raises:
        ValueError: N is not a few tokens more than such a grid.
    """
    for rows, columns in sorted(embeddings, key=math.prod, reverse=True):
        if 0 <= tokens - rows * columns <= MAX_PREFIX and rows * columns > 1:
            return rows, columns, tokens - rows * columns
    for prefix in range(min(MAX_PREFIX + 1, tokens)):
        rows = round(((tokens - prefix) * size[0] / size[1]) ** 0.5)
        if rows and (tokens - prefix) % rows == 0 and rows * size[1] == (tokens - prefix) // rows * size[0]:
            return rows, (tokens - prefix) // rows, prefix
    raise InputError(f"rollout cannot place {tokens} tokens on an image of {size[0]} x {size[1]} pixels.")


class AttentionRollout(Explainer):
    """Attention rollout (Abnar and Zuidema, ACL 2020): what the output token draws from each patch; for all classes.

        A^_l = rownorm(mean over heads(A_l) / 2 + I / 2),   R = A^_L ... A^_1

    The map is R's row of the class token, or without one the mean of the patches' rows. Works on vision transformers
    with global self-attention (timm, torchvision). On lambda networks, as an experiment, the implicit attention
    A[n,m] = |sum_k Q[k,n] (K[k,m] + E[k,m-n])| of the layers at the last resolution takes its place; it is neither
    positive nor stochastic by itself.
    """

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, h, w) on the grid of patches."""
        with torch.no_grad():
            if any(isinstance(module, LambdaLayer) for module in model.modules()):
                return _lambda_rollout(model, images)
            return self._transformer(model, images)

    def _transformer(self, model: nn.Module, images: Tensor) -> Tensor:
        recorder, grids = _Recorder(), []
        convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        with recorder, watching(convolutions, lambda _name, _args, output: grids.append(tuple(output.shape[-2:]))):
            logits_of(model(images))
        shapes = {tuple(attention.shape) for attention in recorder.attentions}
        if len(shapes) != 1 or next(iter(shapes))[0] != len(images):
            found = f"attention matrices of shapes {sorted(shapes)}" if shapes else "no self-attention"
            raise InputError(f"rollout needs global self-attention with one number of tokens; {found} in this model.")
        rolled = rollout(recorder.attentions)
        rows, columns, prefix = token_grid(rolled.shape[-1], images.shape[-2:], grids)
        by_token = prefix > 0 and getattr(model, "global_pool", "token") in ("token", "")
        weights = rolled[:, 0] if by_token else rolled[:, prefix:].mean(dim=1)
        return weights[:, prefix:].unflatten(1, (rows, columns))


def implicit_attention(layer: LambdaLayer, x: Tensor) -> Tensor:
    """|sum_k Q[h,k,n] (sum_u K[u,k,m] + E[k,u,m-n])|, mean over heads, as (B, N, N) with N = H W positions."""
    height, width = x.shape[-2:]
    query, key, _ = layer.project(x)
    row = torch.arange(height, device=x.device).repeat_interleave(width)
    column = torch.arange(width, device=x.device).repeat(height)
    half = layer.r // 2
    down, right = row[None] - row[:, None] + half, column[None] - column[:, None] + half  # m - n, (N, N)
    inside = (down >= 0) & (down < layer.r) & (right >= 0) & (right < layer.r)
    window = layer.position_weight.sum(dim=1)
    limit = layer.r - 1
    position = window[:, down.clamp(0, limit), right.clamp(0, limit)] * inside
    queries, keys = query.flatten(3), key.sum(dim=1).flatten(2)
    signed = torch.einsum("bhkn,bkm->bhnm", queries, keys) + torch.einsum("bhkn,knm->bhnm", queries, position)
    return signed.abs().mean(dim=1)


def _lambda_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """(B, h, w): mean row of the rollout over the lambda layers at the last resolution."""
    inputs: list[tuple[LambdaLayer, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, LambdaLayer)]
    with temporary_hooks(before=dict.fromkeys(layers, lambda layer, args: inputs.append((layer, args[0])))):
        fast_logits(model, images)
    size = inputs[-1][1].shape[-2:]
    rolled = rollout(implicit_attention(layer, x) for layer, x in inputs if x.shape[-2:] == size)
    return rolled.mean(dim=1).unflatten(1, tuple(size))
