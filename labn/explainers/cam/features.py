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
from labn.explainers.cam.target_layer import TargetLayer
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import fast_logits


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


@contextmanager
def replacing_output(
    model: nn.Module, layer: TargetLayer | nn.Module, size: torch.Size, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Make a call of `layer` return `change(A)` in place of its feature maps A within the block.

    Args:
        model: the model that the layer belongs to; every forward of it counts the layer's calls anew.
        layer: a call of a submodule, or a submodule that runs once.
        size: (H, W) of the images, whose proportions tell (B, h, w, K) from (B, K, h, w) where nothing else does.
        change: function of A (B, K, h, w), called at every forward of the model.

    Raises:
        InputError: during a forward, if the layer returns neither feature maps nor tokens of a known grid.
    """

    target = layer if isinstance(layer, TargetLayer) else TargetLayer(layer)

    def hook(module: nn.Module, _args: Any, output: Any) -> Tensor:
        return target.output_of(change(target.maps_of(output, size)), output, size)

    with hooking_call(model, layer, hook):
        yield


class DividedBatchError(InputError):
    """A layer runs more often for a batch than for one image, because the model divides the batch."""


@contextmanager
def hooking_call(
    model: nn.Module, layer: TargetLayer | nn.Module, hook: Callable[[nn.Module, Any, Any], Any]
) -> Iterator[None]:
    """Call `hook(module, args, output)` after one call of a layer; what it returns replaces the output.

    Raises:
        InputError: during a forward, if the layer runs more often than in the forward in which it was found.
    """
    target = layer if isinstance(layer, TargetLayer) else TargetLayer(layer)
    calls = 0

    def restart(_module: nn.Module, _args: Any) -> None:
        nonlocal calls
        calls = 0

    def counted(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > target.calls:
            raise DividedBatchError(
                f"target_layer ({type(module).__name__}) runs more often for a batch than for one image (calls: "
                f"{target.calls}): the model divides the batch; explain the images one by one."
            )
        return hook(module, args, output) if calls - 1 == target.call else None

    with temporary_hooks(before={model: restart}, after={target.module: counted}, prepend=True):
        yield


@contextmanager
def replacing_call(model: nn.Module, layer: TargetLayer, output: Tensor) -> Iterator[None]:
    """Make a call of a layer return `output`."""
    with hooking_call(model, layer, lambda _module, _args, _output: output):
        yield


def wide(maps: Tensor) -> Tensor:
    """Feature maps in float32 where they are in half precision, whose sums over a map overflow or lose digits."""
    return maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps


def layer_features(model: nn.Module, layer: TargetLayer | nn.Module, images: Tensor) -> Features:
    """Feature maps of `layer` and the logits of (B, C, H, W), without gradients."""
    maps: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        maps[:] = [output.clone()]  # a copy: the next layer may work in place
        return output

    with torch.no_grad(), replacing_output(model, layer, images.shape[-2:], keep):
        logits = fast_logits(model, images)
    return Features(wide(maps[0]), logits)


def gradient_features(
    model: nn.Module,
    layer: TargetLayer | nn.Module,
    images: Tensor,
    targets: Tensor,
    attend: Callable[[Tensor], Tensor] | None = None,
    score: Callable[[Tensor, Tensor], Tensor] = class_scores,
) -> Features:
    """Feature maps of `layer` with the gradient of each target's logit.

    Gradient mode is switched on when the layer returns, so that graph and backward pass cover only the layers after it.

    Args:
        model: run once.
        layer: a call of a submodule that returns feature maps, or a submodule that runs once.
        images: (B, C, H, W).
        targets: (B,) int64.
        attend: applied to the feature maps before the next layer reads them; the result is A.
        score: logits (B, num_classes) and targets -> the score (B,) whose gradient is taken; by default the logit.

    Raises:
        InputError: the logits do not depend on the layer, or a target is not a class index.
    """
    leaves: list[Tensor] = []

    def start_graph(output: Tensor) -> Tensor:
        leaves[:] = [(output if attend is None else attend(output)).detach().requires_grad_()]
        torch.set_grad_enabled(True)
        return leaves[0].clone()  # a copy: an in-place layer must not overwrite the leaf

    with torch.no_grad(), replacing_output(model, layer, images.shape[-2:], start_graph):
        logits = fast_logits(model, images)
    if not leaves or not logits.requires_grad:
        raise InputError(
            f"No gradient of the logits of {type(model).__name__} reaches target_layer: the layer does not determine "
            "them, or runs under torch.no_grad(); name a layer before the logits, or take a method without gradients."
        )
    # Images do not influence each other in eval mode, so one gradient of the sum gives all of them.
    (gradients,) = torch.autograd.grad(score(logits, targets).sum(), leaves[0])
    return Features(wide(leaves[0].detach()), logits.detach(), wide(gradients))
