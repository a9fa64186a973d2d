"""Attention rollout through a transformer, and, as an experiment, through a lambda network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.explainers.cam.target_layer import watching
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import fast_logits, run_model
from labn.models.lambda_networks.layer import LambdaLayer

MAX_PREFIX = 16  # largest number of class, distillation and register tokens in front of the patches


def rollout(attentions: Iterable[Tensor]) -> Tensor:
    """A^_L ... A^_1 with A^ = rownorm(A / 2 + I / 2) (Abnar and Zuidema, ACL 2020, section 3).

    Args:
        attentions: (B, N, N) non-negative matrices, the first layer first; row n holds the attention of token n.

    Returns:
        (B, N, N), rows that sum to 1.

    Raises:
        InputError: there is no matrix.
    """
    result: Tensor | None = None
    for attention in attentions:
        # The identity stands for the residual connection around the attention.
        mixed = attention / 2 + torch.eye(attention.shape[-1], device=attention.device, dtype=attention.dtype) / 2
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        result = mixed if result is None else mixed @ result
    if result is None:
        raise InputError("rollout needs the attention of at least one layer.")
    return result


class AttentionRecorder(TorchFunctionMode):
    """Records every self-attention matrix of a forward pass, mean over heads, however the model computes it.

    A softmax is attention if its result, directly or through reshapes, dropout and the like, is multiplied with values
    as a matrix from the left: it is recorded as it is multiplied there. A softmax over feature maps is not, even if
    these are square.

    Args:
        batch: B, by which matrices (B * heads, N, N) are divided.
    """

    method = "rollout"

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.attentions: list[Tensor] = []
        self._batch = batch
        self._softmaxes = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in HANDLERS:
            return self.handle(func, args, kwargs)
        first = args[0] if args else None
        if func in PRODUCTS and self._is_softmax(first):
            args = (self.record(first), *args[1:])
        if func is torch.einsum and len(args) == 3 and self._is_softmax(args[1]):
            args = (args[0], self._record_einsum(*args[:2]), args[2])
        result = func(*args, **kwargs)
        if func in SOFTMAXES or (_holds_as_many(result, first) and self._is_softmax(first)):
            self._softmaxes[result] = True
        return result

    def _is_softmax(self, value: Any) -> TypeGuard[Tensor]:
        return isinstance(value, Tensor) and value in self._softmaxes

    def _record_einsum(self, equation: str, attention: Tensor) -> Tensor:
        """Record the first operand of an einsum, whose keys are the index that is summed over."""
        indices, result = equation.replace(" ", "").split(",")[0], equation.rpartition("->")[2]
        if indices[-1] not in result:
            return self.record(attention)
        return self.record(attention.mT).mT if indices[-2] not in result else attention

    def record(self, attention: Tensor) -> Tensor:
        """Keep the matrix that values are multiplied with, and return what takes its place in the product."""
        if (matrices := self.by_head(attention)) is not None:
            self.attentions.append(matrices.mean(dim=1))
        return attention

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record the matrix of a function that computes attention as a whole, and return its result."""
        return HANDLERS[func](self, func, args, kwargs)

    def by_head(self, attention: Tensor) -> Tensor | None:
        """(B, heads, N, N) of a matrix (B, heads, N, N), (B * heads, N, N) or (B, N, N) whose rows are distributions.

        None for a matrix that is not square in the tokens, which is attention between other things. Of more axes, such
        as (B, windows, heads, N, N), all but the last three become the first one.
        """
        if attention.ndim > 4:
            attention = attention.flatten(0, -4)
        if attention.ndim == 3 and len(attention) % self._batch == 0:
            attention = attention.unflatten(0, (self._batch, -1))
        if attention.ndim != 4 or attention.shape[-1] != attention.shape[-2]:
            return None
        if not torch.allclose(attention.sum(-1), attention.new_ones(()), atol=1e-3):
            raise InputError(
                f"{self.method} needs attention whose rows sum to one; a softmax of this model is over the queries, or "
                "its attention is changed after the softmax."
            )
        return attention


def _holds_as_many(result: Any, first: Any) -> bool:
    return isinstance(result, Tensor) and isinstance(first, Tensor) and result.numel() == first.numel()


def _fused(recorder: AttentionRecorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`F.scaled_dot_product_attention` does not return its matrix, which is therefore computed once more."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args)), **kwargs}
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    scores = query @ key.mT * (given.get("scale") or query.shape[-1] ** -0.5)
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    recorder.record(scores.softmax(dim=-1))
    return func(*args, **kwargs)


def _multi_head(recorder: AttentionRecorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's own multi-head attention, which returns its matrix on request."""
    options = {**kwargs, "need_weights": True, "average_attn_weights": False}
    output, attention = func(*args, **options)
    recorder.record(attention)
    return output, None


SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}

# Products of matrices, of which the first operand mixes the rows of the second.
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}

HANDLERS: dict[Any, Callable[[AttentionRecorder, Any, Any, dict[str, Any]], Any]] = {
    F.scaled_dot_product_attention: _fused,
    F.multi_head_attention_forward: _multi_head,
}


def token_grid(
    tokens: int, size: torch.Size, embeddings: Sequence[tuple[int, int]] = (), method: str = "rollout"
) -> tuple[int, int, int]:
    """The grid of N tokens: rows, columns, and the number of prefix tokens in front of the patches.

    The grid is the output of one of the model's convolutions, the finest with at most N positions, or a grid in the
    image's proportions where no convolution fits.

    Args:
        tokens: N.
        size: (H, W) of the image.
        embeddings: rows and columns of the outputs of the model's convolutions.
        method: name of the method for the message.

    Raises:
        InputError: no grid has N tokens, with at most MAX_PREFIX prefix tokens.
    """
    for rows, columns in sorted(embeddings, key=math.prod, reverse=True):
        if 0 <= tokens - rows * columns <= MAX_PREFIX and rows * columns > 1:
            return rows, columns, tokens - rows * columns
    for prefix in range(min(MAX_PREFIX + 1, tokens)):
        rows = round(((tokens - prefix) * size[0] / size[1]) ** 0.5)
        if rows and (tokens - prefix) % rows == 0 and rows * size[1] == (tokens - prefix) // rows * size[0]:
            return rows, (tokens - prefix) // rows, prefix
    raise InputError(f"{method} cannot place {tokens} tokens on an image of {size[0]} x {size[1]} pixels.")


@contextmanager
def convolution_grids(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """A list that fills with the rows and columns of the outputs of the model's convolutions within the block."""
    grids: list[tuple[int, int]] = []
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    with watching(convolutions, lambda _name, _args, output: grids.append(tuple(output.shape[-2:]))):
        yield grids


def check_attentions(attentions: Sequence[Tensor], batch: int, method: str) -> None:
    """Raise InputError unless there are attention matrices (B, ...), all of one shape."""
    shapes = {tuple(attention.shape) for attention in attentions}
    if len(shapes) != 1 or next(iter(shapes))[0] != batch:
        seen = f"attention matrices of shapes {sorted(shapes)}" if shapes else "no self-attention"
        raise InputError(f"{method} needs global self-attention with one number of tokens; {seen} in this model.")


class AttentionRollout(Explainer):
    """Attention rollout (Abnar and Zuidema, ACL 2020): how much each patch contributes to the output token.

        A^_l = rownorm(mean over heads(A_l) / 2 + I / 2),   R = A^_L ... A^_1

    The map is the row of R for the class token, or the mean of the patches' rows in a network without class token; it
    is the same for all classes. The method works on vision transformers with global self-attention (timm, torchvision).
    On lambda networks, as an experiment, A is the implicit attention |sum_k Q[k,n] (K[k,m] + E[k,m-n])| of the layers
    at the last resolution, whose rows are normalised like those of attention.

    Example:
        >>> import torch
        >>> from torchvision.models import VisionTransformer
        >>> from labn.explainers import AttentionRollout
        >>> sizes = {"num_layers": 2, "num_heads": 1, "hidden_dim": 4, "mlp_dim": 4, "num_classes": 2}
        >>> model = VisionTransformer(image_size=8, patch_size=4, **sizes)
        >>> AttentionRollout()(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w) on the grid of patches."""
        with torch.no_grad():
            if any(isinstance(module, LambdaLayer) for module in model.modules()):
                return _lambda_rollout(model, images)
            return self._transformer(model, images)

    def _transformer(self, model: nn.Module, images: Tensor) -> Tensor:
        recorder = AttentionRecorder(len(images))
        with recorder, convolution_grids(model) as grids:
            run_model(model, images)
        check_attentions(recorder.attentions, len(images), "rollout")
        rolled = rollout(recorder.attentions)
        rows, columns, prefix = token_grid(rolled.shape[-1], images.shape[-2:], grids)
        # timm names its pooling; models without the attribute, such as torchvision's, read the class token.
        by_token = prefix > 0 and getattr(model, "global_pool", "token") in ("token", "")
        weights = rolled[:, 0] if by_token else rolled[:, prefix:].mean(dim=1)
        return weights[:, prefix:].unflatten(1, (rows, columns))


def implicit_attention(layer: LambdaLayer, x: Tensor) -> Tensor:
    """|sum_k Q[h,k,n] (sum_u K[u,k,m] + E[k,u,m-n])|, mean over heads, as (B, N, N) with N = H W positions.

    Args:
        layer: a lambda layer.
        x: (B, d, H, W), its input.
    """
    height, width = x.shape[-2:]
    query, key, _ = layer.project(x)
    row = torch.arange(height, device=x.device).repeat_interleave(width)
    column = torch.arange(width, device=x.device).repeat(height)
    half = layer.r // 2
    # m - n as an index into the window, whose centre is the offset 0.
    down, right = row[None] - row[:, None] + half, column[None] - column[:, None] + half  # m - n, (N, N)
    inside = (down >= 0) & (down < layer.r) & (right >= 0) & (right < layer.r)
    window = layer.position_weight.sum(dim=1)
    limit = layer.r - 1
    position = window[:, down.clamp(0, limit), right.clamp(0, limit)] * inside
    queries, keys = query.flatten(3), key.sum(dim=1).flatten(2)
    signed = torch.einsum("bhkn,bkm->bhnm", queries, keys) + torch.einsum("bhkn,knm->bhnm", queries, position)
    return signed.abs().mean(dim=1)


def _lambda_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Mean row (B, h, w) of the rollout over the lambda layers at the last resolution."""
    inputs: list[tuple[LambdaLayer, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, LambdaLayer)]
    with temporary_hooks(before=dict.fromkeys(layers, lambda layer, args: inputs.append((layer, args[0])))):
        fast_logits(model, images)
    size = inputs[-1][1].shape[-2:]
    rolled = rollout(implicit_attention(layer, x) for layer, x in inputs if x.shape[-2:] == size)
    return rolled.mean(dim=1).unflatten(1, tuple(size))
