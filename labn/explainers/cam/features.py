"""Feature maps of one layer and the gradient of the target's logit there, without a graph before that layer."""

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
    """Feature maps and logits of one forward pass.

    Attributes:
        activations: A (B, K, h, w).
        logits: (B, num_classes).
        gradients: dy_c/dA (B, K, h, w) of the logit y_c of each image's target; None if not computed.
    """

    activations: Tensor
    logits: Tensor
    gradients: Tensor | None = None

    @property
    def slopes(self) -> Tensor:
        """The gradients of features that have them."""
        assert self.gradients is not None
        return self.gradients


def target_layer_of(model: nn.Module, images: Tensor, name: str | None) -> nn.Module:
    """The layer called `name`, or for None the last one with spatial feature maps."""
    return named_layer(model, find_target_layer(model, images) if name is None else name)


def fast_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, num_classes), computed in channels_last, in which convolutions are faster, where the model allows it.

    A model that calls `view` on its feature maps fails in this memory format and is run again in the default one.
    """
    try:
        return logits_of(model(images.contiguous(memory_format=torch.channels_last)))
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        return logits_of(model(images.contiguous()))


@contextmanager
def replacing_output(layer: nn.Module, size: torch.Size, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make `layer` return `change(A)` in place of its feature maps A within the block.

    Args:
        layer: any submodule that returns feature maps.
        size: (H, W) of the images, whose proportions distinguish (B, h, w, K) from (B, K, h, w).
        change: function of A (B, K, h, w), called at every forward of the layer.

    Raises:
        InputError: during a forward, if the layer does not return feature maps.
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
    maps: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        maps[:] = [output.clone()]  # a copy: the next layer may work in place
        return output

    with torch.no_grad(), replacing_output(layer, images.shape[-2:], keep):
        logits = fast_logits(model, images)
    return Features(maps[0], logits)


def gradient_features(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    targets: Tensor,
    attend: Callable[[Tensor], Tensor] | None = None,
) -> Features:
    """Feature maps of `layer` with the gradient of each target's logit.

    Gradient mode is switched on when the layer returns, so that graph and backward pass cover only the layers after it.

    Args:
        model: run once.
        layer: a submodule of the model that returns feature maps.
        images: (B, C, H, W).
        targets: (B,) int64.
        attend: applied to the feature maps before the next layer reads them; the result is A.

    Raises:
        InputError: the logits do not depend on the layer, or a target is not a class index.
    """
    leaves: list[Tensor] = []

    def start_graph(output: Tensor) -> Tensor:
        leaves[:] = [(output if attend is None else attend(output)).detach().requires_grad_()]
        torch.set_grad_enabled(True)
        return leaves[0].clone()  # a copy: an in-place layer must not overwrite the leaf

    with torch.no_grad(), replacing_output(layer, images.shape[-2:], start_graph):
        logits = fast_logits(model, images)
    if not leaves or not logits.requires_grad:
        raise InputError(
            f"The logits of {type(model).__name__} do not depend on target_layer; name a layer before them."
        )
    # Images do not influence each other in eval mode, so one gradient of the sum gives all of them.
    (gradients,) = torch.autograd.grad(class_scores(logits, targets).sum(), leaves[0])
    return Features(leaves[0].detach(), logits.detach(), gradients)
