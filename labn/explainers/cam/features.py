"""One layer's feature maps and the gradient of the target's logit there, for the price of a forward without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import class_scores
from labn.explainers.cam.target_layer import find_target_layer, is_channels_last, named_layer
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import logits_of


@dataclass(frozen=True)
class Features:
    """What a forward pass showed at the target layer.

    Attributes:
        activations: A (B, K, h, w).
        logits: (B, num_classes).
        gradients: dy_c/dA (B, K, h, w) of the logit y_c of each image's target; None where they were not asked for.
    """

    activations: Tensor
    logits: Tensor
    gradients: Tensor | None = None

    @property
    def slopes(self) -> Tensor:
        """The gradients, where they were asked for."""
        assert self.gradients is not None
        return self.gradients


def target_layer_of(model: nn.Module, images: Tensor, name: str | None) -> nn.Module:
    """The layer called `name`, or with None the last one with spatial feature maps."""
    return named_layer(model, find_target_layer(model, images) if name is None else name)


def fast_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, num_classes), computed with the channels last in memory wherever the model allows it.

    The values are the same and convolutions are faster; a model that calls `view` on its feature maps refuses this
    format and is run again in the default one.
    """
    try:
        return logits_of(model(images.contiguous(memory_format=torch.channels_last)))
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        return logits_of(model(images.contiguous()))


@contextmanager
def replacing_output(layer: nn.Module, size: torch.Size, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `layer` return `change(A)` instead of its feature maps A, which `change` sees as (B, K, h, w).

    Args:
        layer: any submodule that returns feature maps.
        size: (H, W) of the images, by whose proportions (B, h, w, K) is told from (B, K, h, w).
        change: called at every forward of the layer.

    Raises:
        ValueError: from within the forward, where the layer returns something else than feature maps.
    """

    def hook(module: nn.Module, _args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"target_layer ({type(module).__name__}) returns {shape}; (B, K, h, w) is needed.")
        if is_channels_last(output.shape, size):
            return change(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return change(output)

    with temporary_hooks(after={layer: hook}):
        yield


def layer_features(model: nn.Module, layer: nn.Module, images: Tensor) -> Features:
    """Feature maps of `layer` and the logits of (B, C, H, W), without gradients."""
    kept: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        kept[:] = [output.clone()]  # a copy: the layer behind may work in place
        return output

    with torch.no_grad(), replacing_output(layer, images.shape[-2:], keep):
        logits = fast_logits(model, images)
    return Features(kept[0], logits)


def gradient_features(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    targets: Tensor,
    attend: Callable[[Tensor], Tensor] | None = None,
) -> Features:
    """Feature maps of `layer` with the gradient of each target's logit.

    Gradient mode is switched on as the layer returns, so that the graph and the backward pass cover the tail of the
    network alone.

    Args:
        model: run once.
        layer: a submodule of it that returns feature maps.
        images: (B, C, H, W).
        targets: (B,) int64.
        attend: applied to the feature maps before the network goes on with them; the result is A.

    Raises:
        ValueError: the logits do not depend on the layer, or a target is not a class index.
    """
    kept: list[Tensor] = []

    def start_graph(output: Tensor) -> Tensor:
        kept[:] = [(output if attend is None else attend(output)).detach().requires_grad_()]
        torch.set_grad_enabled(True)
        return kept[0].clone()  # a copy goes on: an in-place layer behind must not overwrite the leaf

    with torch.no_grad(), replacing_output(layer, images.shape[-2:], start_graph):
        logits = fast_logits(model, images)
    if not kept or not logits.requires_grad:
        raise InputError(
            f"The logits of {type(model).__name__} do not depend on target_layer; name a layer before them."
        )
    (gradients,) = torch.autograd.grad(class_scores(logits, targets).sum(), kept[0])
    return Features(kept[0].detach(), logits.detach(), gradients)
