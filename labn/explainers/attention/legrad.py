"""LeGrad: the gradient of every layer's own score with respect to its attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.attention.rollout import AttentionRecorder, check_attentions, convolution_grids, token_grid
from labn.explainers.base import Explainer, class_scores
from labn.explainers.cam.features import hooking_call
from labn.explainers.cam.target_layer import TargetLayer
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import run_model
from labn.lrp.tracing.decompositions import DECOMPOSITIONS


@dataclass
class _Call:
    """One call of a module: how many attention matrices it computed, and its output."""

    module: nn.Module
    number: int
    attentions: int = 0
    output: Any = None

    def is_block(self, tokens: int) -> bool:
        """Whether the call computed one attention matrix and returned as many tokens (B, N, K) as that has."""
        output = _tokens_of(self.output)
        return self.attentions == 1 and output is not None and output.ndim == 3 and output.shape[1] == tokens


class _AttentionLeaves(AttentionRecorder):
    """Makes every self-attention matrix a leaf of the graph, and notes which module calls it was computed in."""

    method = "legrad"

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.leaves: list[Tensor] = []
        self.callers: list[list[_Call]] = []
        self.open: list[_Call] = []

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute attention step by step, in view of this recorder."""
        fits, steps = DECOMPOSITIONS[func]
        if not fits(*args, **kwargs):
            raise InputError(f"legrad knows no steps for {func.__name__} with the options that this model gives it.")
        with self:
            return steps(*args, **kwargs)

    def record(self, attention: Tensor) -> Tensor:
        """Replace the matrix by a leaf."""
        if self.by_head(attention) is None:
            return attention
        self.leaves.append(attention.detach().requires_grad_())
        self.callers.append(list(self.open))
        for call in self.open:
            call.attentions += 1
        return self.leaves[-1]


@dataclass
class _Blocks:
    """Where the blocks of a transformer end, from one forward of the first image."""

    layers: list[TargetLayer]
    grids: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, image: Tensor) -> _Blocks:
        """The blocks of a model: for every attention matrix the outermost call that computed no other one.

        Raises:
            InputError: no global self-attention, or a block that does not return the tokens.
        """
        leaves, calls = _AttentionLeaves(1), dict.fromkeys(model.modules(), 0)

        def enter(module: nn.Module, _args: Any) -> None:
            leaves.open.append(_Call(module, calls[module]))
            calls[module] += 1

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            leaves.open.pop().output = output

        before, after = (dict.fromkeys(model.modules(), hook) for hook in (enter, leave))
        with torch.no_grad(), leaves, convolution_grids(model) as grids, temporary_hooks(before, after):
            run_model(model, image)
        matrices = [matrix for leaf in leaves.leaves if (matrix := leaves.by_head(leaf)) is not None]
        check_attentions(matrices, 1, "legrad")
        tokens = matrices[0].shape[-1]
        found = [next((call for call in callers if call.is_block(tokens)), None) for callers in leaves.callers]
        blocks = [TargetLayer(call.module, call.number, calls[call.module]) for call in found if call is not None]
        if len(blocks) < len(found):
            raise InputError(f"legrad finds no module of {type(model).__name__} that returns the tokens of one layer.")
        return cls(blocks, grids)


def _tokens_of(output: Any) -> Tensor | None:
    """The tokens that a block returns, alone or first of several values."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


class LeGrad(Explainer):
    """LeGrad (Bousselham et al., ICCV 2025, eq. 5-9): how sensitive the score of every layer is to its attention.

        s_l = y_c with the tokens behind layer l handed to the last norm and the head,
        E_l = mean over heads and queries of ReLU(ds_l / dA_l),   map = mean over l of E_l at the patches

    The method works on vision transformers with global self-attention (timm, torchvision). All layers take one forward
    and one backward pass, whose last norm and head run once per layer.

    Args:
        layers: number of the last layers that the map is the mean of; None: all.

    Raises:
        InputError: `layers` below 1; on call, a network without global self-attention, or with fewer layers.

    Example:
        >>> import torch
        >>> from torchvision.models import VisionTransformer
        >>> from labn.explainers import LeGrad
        >>> sizes = {"num_layers": 2, "num_heads": 1, "hidden_dim": 4, "mlp_dim": 4, "num_classes": 2}
        >>> model = VisionTransformer(image_size=8, patch_size=4, **sizes)
        >>> LeGrad()(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, layers: int | None = None) -> None:
        if layers is not None and layers < 1:
            raise InputError(f"layers must be at least 1, got {layers}.")
        self.layers = layers

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w) on the grid of patches."""
        blocks = _Blocks.of(model, images[:1])
        if self.layers is not None and self.layers > len(blocks.layers):
            raise InputError(
                f"layers is {self.layers}; {type(model).__name__} has {len(blocks.layers)} with attention."
            )
        sensitivities = _sensitivities(model, blocks.layers, images, targets)
        relevance = torch.stack(sensitivities[-(self.layers or len(sensitivities)) :]).mean(0)
        rows, columns, prefix = token_grid(relevance.shape[-1], images.shape[-2:], blocks.grids, "legrad")
        return relevance[:, prefix:].unflatten(1, (rows, columns))


def _sensitivities(model: nn.Module, blocks: list[TargetLayer], images: Tensor, targets: Tensor) -> list[Tensor]:
    """Per layer the mean (B, N) over heads and queries of the positive gradients of the layer's own score."""
    leaves, tokens = _AttentionLeaves(len(images)), []

    def behind(last: bool) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            found = _tokens_of(output)
            assert found is not None  # `_Blocks.of` has seen it
            tokens.append(found)
            # Behind the last block run all layers' tokens, as a batch; elsewhere the graph ends with its layer.
            changed = torch.cat(tokens) if last else found.detach()
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(hooking_call(model, block, behind(block is blocks[-1])))
        hooks.enter_context(leaves)
        logits = run_model(model, images)
    if len(logits) != len(blocks) * len(images):
        raise InputError(f"legrad cannot hand all layers' tokens to the head of {type(model).__name__} at once.")
    scores = class_scores(logits, targets.repeat(len(blocks)))
    gradients = torch.autograd.grad(scores.sum(), leaves.leaves)
    return [g.relu().reshape(len(images), -1, *g.shape[-2:]).mean((1, 2)) for g in gradients]
