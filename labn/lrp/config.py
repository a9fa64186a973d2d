"""The choices of a relevance propagation, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from labn.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RuleName = Literal["simple", "epsilon", "zplus", "alphabeta", "gamma", "flat"]
FirstName = Literal["ones", "zb", "input", "flat", "w2", "epsilon", "same"]
BlockWeights = Literal["signed", "zplus"]
ResidualName = Literal["ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"]


@dataclass(frozen=True)
class Config:
    """How relevance is propagated; the defaults are ratio splitting with z+ (ECCV 2024) with the bias left out.

    Attributes:
        rule: rule of the convolutions, and of values weighed by what the image makes, as in lambda layers, the weights
            held constant (Ali et al., ICML 2022; see `labn.lrp.weighted_product`).
        linear_rule: rule of the fully connected layers; None: the same.
        residual: how a residual sum shares relevance between its branches. Under `block`, a block that begins at the
            pixels shares by `ratio`, so that its first layer can have its own rule, unless that is `same`.
        block_weights: under `residual="block"`, the block as it is (`signed`) or with BatchNorm folded, its weights
            clamped at zero and its biases left out (`zplus`), which conserves relevance.
        batchnorm: `pass` hands relevance through a BatchNorm unchanged, `fold` joins it to the layer before.
        pooling: max pooling, `winner` takes all or `average` over the same windows.
        first_layer: rule where the images enter: `ones` (activation replaced by 1), `zb` (pixel bounds), `input`
            (z+ on both signs of the pixels), `flat`, `w2` (squared weights), `epsilon`, or `same` as the other layers.
            Pooling and resizing of signed values before it share by coefficients alone, but for `epsilon` and `same`.
        eps, eps_mode: stabiliser, `relative` to the mean |z| of the sample's layer or `absolute`.
        alpha, beta, gamma: parameters of the rules so named, alpha - beta = 1.
        low, high: per channel, the bounds of normalised pixels for `zb`; None: black and white after ImageNet's
            normalisation.
    """

    rule: RuleName = "zplus"
    linear_rule: RuleName | None = None
    residual: ResidualName = "ratio"
    block_weights: BlockWeights = "signed"
    batchnorm: Literal["pass", "fold"] = "pass"
    pooling: Literal["winner", "average"] = "winner"
    first_layer: FirstName = "ones"
    eps: float = 1e-9
    eps_mode: Literal["relative", "absolute"] = "relative"
    alpha: float = 2.0
    beta: float = 1.0
    gamma: float = 0.25
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        choices = {
            "rule": ("simple", "epsilon", "zplus", "alphabeta", "gamma", "flat"),
            "linear_rule": (None, "simple", "epsilon", "zplus", "alphabeta", "gamma", "flat"),
            "residual": ("ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"),
            "block_weights": ("signed", "zplus"),
            "batchnorm": ("pass", "fold"),
            "pooling": ("winner", "average"),
            "first_layer": ("ones", "zb", "input", "flat", "w2", "epsilon", "same"),
            "eps_mode": ("relative", "absolute"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}.")
        if abs(self.alpha - self.beta - 1) > 1e-12 or self.beta < 0:
            raise InputError(f"alpha - beta must be 1 with beta >= 0, got alpha={self.alpha}, beta={self.beta}.")
        if self.block_weights != "signed" and self.residual != "block":
            raise InputError(f"block_weights={self.block_weights!r} needs residual='block', got {self.residual!r}.")
        if self.eps < 0 or self.gamma < 0:
            raise InputError(f"eps and gamma must not be negative, got eps={self.eps}, gamma={self.gamma}.")
        if self.eps == 0 and self.eps_mode == "absolute":
            raise InputError("eps must be above 0 with eps_mode='absolute': nothing else keeps 0 / 0 away.")

    @property
    def folded(self) -> bool:
        """Whether rules see BatchNorm as part of the layer before it."""
        return self.batchnorm == "fold"

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest pixel value per channel, each (1, C, 1, 1).

        Raises:
            ValueError: not one bound per channel of the images.
        """
        low = self.low or tuple(-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD))
        high = self.high or tuple((1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD))
        if {len(low), len(high)} != {images.shape[1]}:
            raise InputError(f"first_layer='zb' needs low and high for each of the {images.shape[1]} image channels.")
        shape = (1, -1, *[1] * (images.ndim - 2))
        return tuple(torch.tensor(b, dtype=images.dtype, device=images.device).view(shape) for b in (low, high))  # type: ignore[return-value]
