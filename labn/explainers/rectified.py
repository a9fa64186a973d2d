"""Gradients whose backward pass through every ReLU is changed: guided backpropagation and Deconvnet."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labn.errors import InputError
from labn.explainers.gradient import GradientAttribution, input_gradient

IN_PLACE = (torch.relu_, Tensor.relu_)
RELUS = (F.relu, torch.relu, Tensor.relu, *IN_PLACE)


class _Rectified(torch.autograd.Function):
    """ReLU whose gradient is `rule(gradient, x > 0)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Callable[[Tensor, Tensor], Tensor], in_place: bool) -> Tensor:
        """ReLU of x, in x itself if `in_place`."""
        ctx.rule = rule
        ctx.save_for_backward(x > 0)
        if in_place:
            ctx.mark_dirty(x)
            return x.clamp_(min=0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient by the rule."""
        return ctx.rule(gradients[0], ctx.saved_tensors[0]), None, None


class ReluGradient(TorchFunctionMode):
    """While it is entered, every call of a ReLU has the gradient `rule(gradient, x > 0)`, also of `nn.ReLU`.

    Args:
        rule: gradient at the output, and where the input is positive -> gradient at the input.

    Attributes:
        calls: number of ReLUs that ran.
    """

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule, self.calls = rule, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, or a ReLU with the rule in its place."""
        options = dict(kwargs or {})
        if func not in RELUS:
            return func(*args, **options)
        self.calls += 1
        x = args[0] if args else options["input"]
        in_place = func in IN_PLACE or bool(options.get("inplace", args[1] if len(args) > 1 else False))
        return _Rectified.apply(x, self.rule, in_place)


class _RectifiedGradient(GradientAttribution):
    """A gradient that is changed at every ReLU."""

    @staticmethod
    @abstractmethod
    def rule(gradient: Tensor, positive: Tensor) -> Tensor:
        """The gradient at a ReLU's input, from that at its output and where the input is positive."""

    def per_channel(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """The changed gradient (B, C, H, W).

        Raises:
            InputError: the model calls no ReLU, where the map would be the plain gradient.
        """
        with ReluGradient(self.rule) as mode:
            gradient = input_gradient(model, images, targets)
        if not mode.calls:
            raise InputError(
                f"{type(self).__name__} changes the gradient of ReLUs, and {type(model).__name__} calls none; "
                "take gradient."
            )
        return gradient


class GuidedBackpropagation(_RectifiedGradient):
    """Guided backpropagation (Springenberg et al., ICLR workshop 2015): R_in = R_out [x > 0] [R_out > 0] at every ReLU.

    It shows edges of the image more than the class: with random weights its maps hardly change (Adebayo et al. 2018).
    Other activations keep their gradient.

    Args:
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import GuidedBackpropagation
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.eye(2)), model[3].weight.data.copy_(torch.tensor([[3.0, -5.0]]))
        >>> GuidedBackpropagation()(model, torch.ones(1, 1, 1, 2), torch.tensor([0]))
        tensor([[[3., 0.]]])
    """

    @staticmethod
    def rule(gradient: Tensor, positive: Tensor) -> Tensor:
        """Positive gradients where the input is positive."""
        return gradient.relu() * positive


class Deconvnet(_RectifiedGradient):
    """Deconvnet (Zeiler and Fergus, ECCV 2014): R_in = R_out [R_out > 0] at every ReLU, whatever its input was.

    Max pooling sends the signal back to the place of the maximum, as the paper's switches do.

    Args:
        channels: "sum", or the unsigned "mean_abs", "max_abs" or "l2".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import Deconvnet
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.eye(2)), model[3].weight.data.copy_(torch.tensor([[3.0, -5.0]]))
        >>> Deconvnet()(model, torch.tensor([[[[-1.0, 1.0]]]]), torch.tensor([0]))
        tensor([[[3., 0.]]])
    """

    @staticmethod
    def rule(gradient: Tensor, positive: Tensor) -> Tensor:
        """Positive gradients."""
        return gradient.relu()
