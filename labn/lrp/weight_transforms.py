"""Weight transforms rho: the changes that the rules of relevance propagation make to the weights of a layer.

Every rule has the form R_i = a_i sum_j rho(w_ij) R_j / z~_j (Montavon et al. 2019); the rules differ in rho. A
transform is a frozen dataclass and therefore hashable: it is the key under which a layer keeps its prepared weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


class WeightTransform(ABC):
    """An elementwise function rho of the weights.

    Example:
        >>> import torch
        >>> from labn.lrp import Positive
        >>> Positive().mirrored(torch.tensor([-2.0, 4.0]))
        tensor([-2.,  0.])
    """

    @abstractmethod
    def __call__(self, weight: Tensor) -> Tensor:
        """rho(weight), in the weight's shape."""

    @property
    def mirrored(self) -> WeightTransform:
        """The transform rho' with rho(g w) = g rho'(w) for a factor g < 0, such as the scale of a folded BatchNorm."""
        return self


@dataclass(frozen=True)
class Identity(WeightTransform):
    """rho(w) = w: the weights of LRP-0, LRP-epsilon and the z-box rule.

    Example:
        >>> import torch
        >>> from labn.lrp import Identity
        >>> Identity()(torch.tensor([-2.0, 4.0]))
        tensor([-2.,  4.])
    """

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight itself, not a copy."""
        return weight


@dataclass(frozen=True)
class Positive(WeightTransform):
    """rho(w) = w+ = max(w, 0).

    Example:
        >>> import torch
        >>> from labn.lrp import Positive
        >>> Positive()(torch.tensor([-2.0, 4.0]))
        tensor([0., 4.])
    """

    def __call__(self, weight: Tensor) -> Tensor:
        """Negative weights set to 0."""
        return weight.clamp(min=0)

    @property
    def mirrored(self) -> WeightTransform:
        """(g w)+ = g w- for g < 0."""
        return Negative()


@dataclass(frozen=True)
class Negative(WeightTransform):
    """rho(w) = w- = min(w, 0).

    Example:
        >>> import torch
        >>> from labn.lrp import Negative
        >>> Negative()(torch.tensor([-2.0, 4.0]))
        tensor([-2.,  0.])
    """

    def __call__(self, weight: Tensor) -> Tensor:
        """Positive weights set to 0."""
        return weight.clamp(max=0)

    @property
    def mirrored(self) -> WeightTransform:
        """(g w)- = g w+ for g < 0."""
        return Positive()


@dataclass(frozen=True)
class Gamma(WeightTransform):
    """rho(w) = w + value * w+, or w + value * w- with sign -1: the weights of LRP-gamma.

    Attributes:
        value: the gamma of the rule, >= 0.
        sign: 1 strengthens the positive weights, -1 the negative ones, which negative activations need.

    Example:
        >>> import torch
        >>> from labn.lrp import Gamma
        >>> Gamma(0.5)(torch.tensor([-2.0, 4.0])), Gamma(0.5, sign=-1)(torch.tensor([-2.0, 4.0]))
        (tensor([-2.,  6.]), tensor([-3.,  4.]))
    """

    value: float
    sign: Literal[1, -1] = 1

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight plus `value` times its values of the sign."""
        return weight + self.value * (weight.clamp(min=0) if self.sign > 0 else weight.clamp(max=0))

    @property
    def mirrored(self) -> WeightTransform:
        """The same value for the other sign."""
        return Gamma(self.value, -1 if self.sign > 0 else 1)


@dataclass(frozen=True)
class Flat(WeightTransform):
    """rho(w) = 1: every input of a window gets the same share.

    Example:
        >>> import torch
        >>> from labn.lrp import Flat
        >>> Flat()(torch.tensor([-2.0, 4.0]))
        tensor([1., 1.])
    """

    def __call__(self, weight: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(weight)


@dataclass(frozen=True)
class Square(WeightTransform):
    """rho(w) = w^2: the weights of the w^2 rule (Montavon et al. 2017), which is a rule of the first layer only.

    Example:
        >>> import torch
        >>> from labn.lrp import Square
        >>> Square()(torch.tensor([-2.0, 4.0]))
        tensor([ 4., 16.])
    """

    def __call__(self, weight: Tensor) -> Tensor:
        """The weights squared."""
        return torch.square(weight)
