"""Products of values with weights that the network computes itself, such as attention, as linear layers of the values.

A layer that multiplies two values which both depend on the image, such as attention or a lambda layer, is bilinear and
has no rule. It is linear in its values once its weights are held constant (Ali et al., ICML 2022). `weighted` computes
such a product like ordinary code, and relevance propagation treats the call as one linear layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labn.lrp.weight_transforms import WeightTransform


class Weights(ABC):
    """A linear map y = A v + b of values v, whose A and b are computed from tensors that count as constants.

    The rules of relevance propagation apply rho(A), the matrix A under a weight transform rho, and its transpose.

    Attributes:
        transforms: the classes of `labn.lrp.weight_transforms` that the map supports; None: all. `lrp0` and `epsilon`
            need `Identity`, `zplus` and `alphabeta` need `Positive` and `Negative`, `gamma` needs `Gamma`, `flat` needs
            `Flat`. `Square` belongs to the first layer and is never applied to such a map.

    Example:
        >>> import torch
        >>> from labn.lrp import Identity, Weights
        >>> class Mean(Weights):
        ...     transforms = (Identity,)
        ...     def __init__(self, tokens):
        ...         self.tokens = tokens
        ...     def __call__(self, value):
        ...         return self.apply(value, Identity())
        ...     def apply(self, value, transform):
        ...         return value.mean(1, keepdim=True)
        ...     def adjoint(self, s, transform):
        ...         return s.expand(-1, self.tokens, -1) / self.tokens
        >>> Mean(2)(torch.tensor([[[1.0], [3.0]]]))
        tensor([[[2.]]])
    """

    transforms: tuple[type[WeightTransform], ...] | None = None

    @abstractmethod
    def __call__(self, value: Tensor) -> Tensor:
        """A v + b, as the layer computes it; differentiable in v and in the tensors that A and b are made from."""

    @abstractmethod
    def apply(self, value: Tensor, transform: WeightTransform) -> Tensor:
        """rho(A) v without b.

        Args:
            value: (B, ...), or (1, ...) for one value under the weights of B images, or B values under those of one.
            transform: rho.
        """

    @abstractmethod
    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """rho(A)^T s, in the shape of a value, or of the value after broadcasting.

        Args:
            s: (B, ...), in the shape of an output; batches as in `apply`.
            transform: rho.
        """

    def held(self) -> AbstractContextManager[None]:
        """A context around all calls of one rule; a subclass may keep intermediate results that they share in it."""
        return nullcontext()

    def offset(self) -> Tensor | None:
        """b, in a shape that broadcasts over y; None where the map has no b."""
        return None


class Dense(Weights):
    """The linear map y = weight @ value of a weight in one tensor, as in attention.

    Args:
        weight: (B, ..., outputs, inputs); the values are (B, ..., inputs, channels) and may broadcast along the axes in
            between, as the values of several attention heads that share them do.

    Example:
        >>> import torch
        >>> from labn.lrp import Dense, Positive
        >>> attention = Dense(torch.tensor([[[0.75, 0.25], [-1.0, 2.0]]]))
        >>> value = torch.tensor([[[4.0], [8.0]]])
        >>> attention(value).flatten(), attention.apply(value, Positive()).flatten()
        (tensor([ 5., 12.]), tensor([ 5., 16.]))
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, value: Tensor) -> Tensor:
        """weight @ value, (B, ..., outputs, channels)."""
        return self.weight @ value

    def apply(self, value: Tensor, transform: WeightTransform) -> Tensor:
        """rho(weight) @ value."""
        return transform(self.weight) @ value

    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """rho(weight)^T @ s."""
        return transform(self.weight).mT @ s


def weighted(value: Tensor, weights: Callable[..., Weights], *constants: Any) -> Tensor:
    """The product weights(*constants)(value), which relevance propagation treats as one linear layer of `value`.

    All relevance goes to the value, by the same rules as at a convolution; the constants receive none. This is the
    conservative propagation through attention of Ali et al. (ICML 2022, section 3), where queries and normalised keys
    are the constants.

    Args:
        value: (B, ...), the factor that carries relevance.
        weights: makes the linear map; `Dense` or another subclass of `Weights`.
        constants: arguments of `weights`. Tensors that depend on the image must be passed here: a tensor that is bound
            inside `weights` would keep its values from the image on which the network was recorded.

    Example:
        >>> import torch
        >>> from labn.lrp import Dense, weighted
        >>> attention = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
        >>> weighted(torch.tensor([[[4.0], [8.0]]]), Dense, attention).flatten()
        tensor([5., 6.])
    """
    # The recorder of `labn.lrp.tracing` is a TorchFunctionMode: it sees only calls that are announced this way.
    if has_torch_function((value,)):
        result: Tensor = handle_torch_function(weighted, (value,), value, weights, *constants)
        return result
    return weights(*constants)(value)
