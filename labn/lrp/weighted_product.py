"""Values weighed by constants: how a layer that multiplies what it computes says which factor carries relevance.

A layer that is bilinear in its input, such as attention or a lambda layer, is linear in its values once its weights
are held constant. `weighted` computes such a product like any other code; to relevance propagation it is one
linear layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

# Weights made from a layer's own, by name; `plus` and `minus` are clamped, `flat` is all ones, `square` w^2.
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": lambda weight: weight,
    "plus": lambda weight: weight.clamp(min=0),
    "minus": lambda weight: weight.clamp(max=0),
    "flat": torch.ones_like,
    "square": torch.square,
}


def part_of(name: str) -> Callable[[Tensor], Tensor]:
    """The change of weights that `name` stands for.

    Args:
        name: a key of PARTS, `gamma:<value>` for w + value * w+, or `gamma-:<value>` for w + value * w-.
    """
    if name.startswith("gamma:"):
        gamma = float(name.removeprefix("gamma:"))
        return lambda weight: weight + gamma * weight.clamp(min=0)
    if name.startswith("gamma-:"):
        gamma = float(name.removeprefix("gamma-:"))
        return lambda weight: weight + gamma * weight.clamp(max=0)
    return PARTS[name]


class Weights(ABC):
    """y = A v + b, with A and b made from tensors that count as constants.

    Rules of relevance propagation ask for A with its entries changed, a part rho(A); see `part_of`.

    Attributes:
        parts: names of the parts that there are, without what follows a colon; None: all. The rules `simple` and
            `epsilon` need `weight`, `zplus` and `alphabeta` `plus` and `minus`, `gamma` `gamma` and `gamma-`, `flat`
            `flat`. `square` is never asked for.
    """

    parts: tuple[str, ...] | None = None

    @abstractmethod
    def __call__(self, value: Tensor) -> Tensor:
        """A v + b, as the layer computes it; differentiable in v and in what A and b are made from."""

    @abstractmethod
    def apply(self, value: Tensor, part: str) -> Tensor:
        """rho(A) v, without b; one value (1, ...) may meet the weights of many images, and the other way round."""

    @abstractmethod
    def adjoint(self, s: Tensor, part: str) -> Tensor:
        """rho(A)^T s, in the shape of a value or of what it is broadcast to; batches as in `apply`."""

    def held(self) -> AbstractContextManager[None]:
        """Entered while one rule asks for several parts; a subclass may keep there what they have in common."""
        return nullcontext()

    def offset(self) -> Tensor | None:
        """b, in a shape that broadcasts over y; None where there is none."""
        return None


class Dense(Weights):
    """A given as a tensor: y = weight @ value, as in attention.

    Args:
        weight: (B, ..., outputs, inputs), met by values (B, ..., inputs, channels), which may be broadcast along the
            axes in between (several heads of attention that share their values).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, value: Tensor) -> Tensor:
        """weight @ value, (B, ..., outputs, channels)."""
        return self.weight @ value

    def apply(self, value: Tensor, part: str) -> Tensor:
        """rho(weight) @ value."""
        return part_of(part)(self.weight) @ value

    def adjoint(self, s: Tensor, part: str) -> Tensor:
        """rho(weight)^T @ s."""
        return part_of(part)(self.weight).mT @ s


def weighted(value: Tensor, weights: Callable[..., Weights], *constants: Any) -> Tensor:
    """weights(*constants)(value): the product itself, known to relevance propagation as one linear layer.

    Relevance goes to the value alone, by the same rules as at a convolution, with the constants read as such: queries
    and normalised keys are, in conservative propagation through attention (Ali et al., ICML 2022, section 3).

    Args:
        value: (B, ...), what carries relevance.
        weights: makes the linear map; `Dense` or a class of one's own.
        constants: what it is made from; tensors that come from the image must be given here, not bound in `weights`.
    """
    if has_torch_function((value,)):
        result: Tensor = handle_torch_function(weighted, (value,), value, weights, *constants)
        return result
    return weights(*constants)(value)
