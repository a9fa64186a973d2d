"""The choices of a relevance propagation, checked when they are made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from labn.errors import InputError
from labn.lrp.layer_rules import LayerRule, composite_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The types also list the earlier names, because the command line checks configurations against them.
RuleName = Literal["lrp0", "epsilon", "zplus", "alphabeta", "gamma", "flat", "simple"]
FirstName = Literal["ones", "zbox", "alpha1beta0", "flat", "wsquare", "epsilon", "same", "zb", "input", "w2"]
BlockWeights = Literal["signed", "zplus"]
EARLIER_NAMES = {
    "rule": {"simple": "lrp0"},
    "linear_rule": {"simple": "lrp0"},
    "first_layer": {"zb": "zbox", "input": "alpha1beta0", "w2": "wsquare"},
}
"""Field -> earlier name of a rule -> its name; the earlier names are accepted for one version."""

NormName = Literal["identity", "linear"]
SoftmaxName = Literal["constant", "attnlrp"]
DeadName = Literal["keep", "absolute", "uniform"]
ResidualName = Literal["ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"]


@dataclass(frozen=True)
class Config:
    """How relevance is propagated; the defaults are ratio splitting with z+ without biases (ECCV 2024).

    Attributes:
        rule: rule of the convolutions: `lrp0`, `epsilon`, `zplus`, `alphabeta`, `gamma` or `flat`. It is also the rule
            of values that are multiplied by weights from the same image, as in lambda layers; these weights count as
            constants (Ali et al., ICML 2022; see `labn.lrp.weighted_product`).
        linear_rule: rule of the fully connected layers; None: that of the convolutions.
        residual: how a residual sum F + S divides relevance between its branches: `ratio` (by |F| and |S|), `symmetric`
            (one half each), `ratio_down` and `symmetric_down` (the same at downsampling blocks; an identity shortcut
            gets nothing), `signed` (by F and S), `duplicate` (everything to both), or `block`: a residual block is
            differentiated as one layer (C3-LRP, JSAI 2024). Under `block`, a block that contains the first layer is
            divided by `ratio`, so that the first layer keeps its own rule, unless that rule is `same`.
        block_weights: under `residual="block"`, either the block as it is (`signed`), or the block with BatchNorm
            folded, weights clamped at zero and biases left out (`zplus`), which conserves relevance.
        batchnorm: `pass` hands relevance through a BatchNorm unchanged, `fold` joins it to the layer before. Without
            one (DenseNet, pre-activation ResNets), it is joined to the layer behind if that follows directly and does
            not pad, or else is a layer of its own with the rule `epsilon`; before the first linear layer that only
            holds under first_layer `epsilon` or `same`.
        pooling: at a max pooling, the `winner` takes all, or relevance is divided as at an `average` pooling over the
            same windows.
        first_layer: rule of the first linear layer: `ones` (activation replaced by 1), `zbox` (pixel bounds),
            `alpha1beta0` (z+ for pixels of both signs), `flat`, `wsquare` (squared weights), `epsilon`, or `same` as
            the other layers. Pooling and resizing of signed values before that layer divide relevance by their
            coefficients alone, except under `epsilon` and `same`.
        norm: at a LayerNorm, GroupNorm, InstanceNorm or RMSNorm, whose deviation counts as a constant: `identity` hands
            relevance on unchanged, `linear` divides it by LRP-epsilon among all features under the mean.
        softmax: `constant` takes attention as constant weights, so that relevance goes to the values (Ali et al., ICML
            2022); `attnlrp` also hands relevance to queries and keys (AttnLRP, Achtibat et al., ICML 2024).
        eps, eps_mode: stabiliser of denominators, `relative` to the sample's mean |z| in the layer, or `absolute`.
        alpha, beta, gamma: parameters of the rules of these names; alpha - beta = 1.
        low, high: per channel, the bounds of normalised pixels for `zbox`; None: black and white after ImageNet's
            normalisation.
        biases: whether the rules `zplus` and `alphabeta` count positive biases among the positive contributions and
            negative ones among the negative; a bias keeps its share.
        dead: what z+ does with the relevance of a unit without positive contributions: it may `keep` it, divide it by
            |a w| (`absolute`, which is LRP-epsilon there) or equally (`uniform`). None: `absolute` at recorded matrix
            products, such as attention, whose weights cannot make up for negative values, and `keep` elsewhere.
        composite: rules by layer, by the name of a composite of `labn.lrp.COMPOSITES` or as a list of
            `labn.lrp.LayerRule`; layers that none of them fits have the rules above. None: no composite.

    Raises:
        InputError: an unknown name, or parameters outside of their ranges.

    Example:
        >>> from labn.lrp import Config
        >>> Config(rule="epsilon", batchnorm="fold").residual
        'ratio'
    """

    rule: RuleName = "zplus"
    linear_rule: RuleName | None = None
    residual: ResidualName = "ratio"
    block_weights: BlockWeights = "signed"
    batchnorm: Literal["pass", "fold"] = "pass"
    pooling: Literal["winner", "average"] = "winner"
    first_layer: FirstName = "ones"
    norm: NormName = "identity"
    softmax: SoftmaxName = "constant"
    eps: float = 1e-9
    eps_mode: Literal["relative", "absolute"] = "relative"
    alpha: float = 2.0
    beta: float = 1.0
    gamma: float = 0.25
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    biases: bool = False
    dead: DeadName | None = None
    composite: str | Sequence[LayerRule | Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        self._rename_rules()
        object.__setattr__(self, "composite", composite_of(self.composite))  # a tuple of rules from here on
        choices = {
            "rule": ("lrp0", "epsilon", "zplus", "alphabeta", "gamma", "flat"),
            "linear_rule": (None, "lrp0", "epsilon", "zplus", "alphabeta", "gamma", "flat"),
            "residual": ("ratio", "symmetric", "block", "ratio_down", "symmetric_down", "signed", "duplicate"),
            "block_weights": ("signed", "zplus"),
            "batchnorm": ("pass", "fold"),
            "pooling": ("winner", "average"),
            "first_layer": ("ones", "zbox", "alpha1beta0", "flat", "wsquare", "epsilon", "same"),
            "norm": ("identity", "linear"),
            "dead": (None, "keep", "absolute", "uniform"),
            "softmax": ("constant", "attnlrp"),
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
            raise InputError("eps must be above 0 with eps_mode='absolute', which nothing else protects from 0 / 0.")

    def _rename_rules(self) -> None:
        """Replace the earlier names of rules, with one warning for all of them."""
        renamed = {}
        for field, names in EARLIER_NAMES.items():
            earlier = getattr(self, field)
            if earlier in names:
                object.__setattr__(self, field, names[earlier])  # the dataclass is frozen
                renamed[field] = f"{field}={earlier!r} is now {field}={names[earlier]!r}"
        if renamed:
            warnings.warn("; ".join(renamed.values()) + ".", DeprecationWarning, stacklevel=4)

    @property
    def folded(self) -> bool:
        """Whether the rules see a BatchNorm as one layer with the convolution before it."""
        return self.batchnorm == "fold"

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest pixel value per channel, each (1, C, 1, 1).

        Raises:
            InputError: the number of bounds is not the number of image channels.
        """
        low = self.low or tuple(-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD))
        high = self.high or tuple((1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD))
        if {len(low), len(high)} != {images.shape[1]}:
            raise InputError(f"first_layer='zbox' needs low and high for each of the {images.shape[1]} image channels.")
        shape = (1, -1, *[1] * (images.ndim - 2))
        return tuple(torch.tensor(b, dtype=images.dtype, device=images.device).view(shape) for b in (low, high))  # type: ignore[return-value]
