"""Recorded matrix products of a value and a constant weight, as linear layers whose weights differ per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labn.lrp.tracing.recorder import Call, Ref
from labn.lrp.weight_transforms import Negative, Positive, WeightTransform
from labn.lrp.weighted_product import Weights, weighted


@dataclass(frozen=True)
class Product:
    """A function of two factors that is linear in each, such as `matmul` or `einsum` with its equation.

    Attributes:
        func: the function.
        before: arguments in front of the factors.
        first: whether the value is the first of the two factors.

    Example:
        >>> import torch
        >>> from labn.lrp.tracing.weights_of_calls import Product
        >>> Product(torch.einsum, ("ij,jk->ik",), first=False)(torch.ones(2, 1), torch.ones(1, 2))
        tensor([[2.]])
    """

    func: Callable[..., Tensor]
    before: tuple[Any, ...]
    first: bool

    def __call__(self, value: Tensor, weight: Tensor) -> Tensor:
        """The product of a value and a weight."""
        return self.func(*self.before, *((value, weight) if self.first else (weight, value)))


class Contraction(Weights):
    """The linear map v -> product(v, weight) of a product with a constant second factor.

    Args:
        product: the product.
        weight: its constant factor, for example attention.

    Example:
        >>> import torch
        >>> from labn.lrp import Positive
        >>> from labn.lrp.tracing.weights_of_calls import Contraction, Product
        >>> weights = Contraction(Product(torch.matmul, (), False), torch.tensor([[[0.75, 0.25], [-1.0, 2.0]]]))
        >>> weights.apply(torch.tensor([[[4.0], [8.0]]]), Positive()).flatten()
        tensor([ 5., 16.])
    """

    def __init__(self, product: Product, weight: Tensor) -> None:
        self.product, self.weight = product, weight
        self._non_negative: bool | None = None
        self._value_shape, self._outputs = torch.Size(), 1

    def __call__(self, value: Tensor) -> Tensor:
        """The product itself."""
        return self._product(value, self.weight)

    def apply(self, value: Tensor, transform: WeightTransform) -> Tensor:
        """The product with the transformed weight."""
        return self._product(value, self._transformed(transform))

    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """The transpose of the product with the transformed weight; it is called after a product."""
        weight = self._transformed(transform)
        if self.product.func is torch.matmul and min(weight.ndim, s.ndim, len(self._value_shape)) > 1:
            return s @ weight.mT if self.product.first else weight.mT @ s
        # Many maps of one image: the leading axis of the value grows with that of s.
        count = self._value_shape[0] * len(s) // self._outputs
        value = s.new_zeros((count, *self._value_shape[1:])).requires_grad_()
        with torch.enable_grad():
            output = self.product(value, weight)
        return torch.autograd.grad(output, value, s)[0]

    def _product(self, value: Tensor, weight: Tensor) -> Tensor:
        result = self.product(value, weight)
        self._value_shape, self._outputs = value.shape, len(result)
        return result

    def _transformed(self, transform: WeightTransform) -> Tensor:
        """rho(weight); a weight that is never negative, such as attention, is its own positive part."""
        if not isinstance(transform, (Positive, Negative)):
            return transform(self.weight)
        if self._non_negative is None:
            self._non_negative = bool((self.weight >= 0).all())
        if self._non_negative:
            return self.weight if isinstance(transform, Positive) else torch.zeros_like(self.weight)
        return transform(self.weight)


def factors_of(call: Call) -> list[Any]:
    """The two factors of a recorded matrix product, in the order in which they are multiplied."""
    factors = list(call.args[1:] if call.operation == "einsum" else call.args)
    factors = list(factors[0]) if len(factors) == 1 else factors
    return factors[::-1] if call.operation == "rmatmul" else factors


def as_weighted(call: Call, value: int) -> Call:
    """A recorded matrix product as a call of `labn.lrp.weighted_product.weighted` with a constant weight.

    Args:
        call: a product of two factors, one of which is the value.
        value: index of the factor that carries relevance.
    """
    factors = factors_of(call)
    first = isinstance(factors[0], Ref) and factors[0].index == value
    einsum = call.operation == "einsum"
    product = Product(torch.einsum, call.args[:1], first) if einsum else Product(torch.matmul, (), first)
    constant = factors[1] if first else factors[0]
    return replace(call, func=weighted, args=(Ref(value), partial(Contraction, product), constant), kwargs={})
