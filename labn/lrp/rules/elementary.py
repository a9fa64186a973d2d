"""The rules of layer-wise relevance propagation, one small function each.

With z_j = sum_i a_i w_ij + b_j every rule is R_i = a_i sum_j rho(w_ij) R_j / (z~_j + e_j): apply the changed weights,
divide, apply their transpose, multiply (Bach et al. 2015; Montavon et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError
from labn.lrp.config import Config
from labn.lrp.rules.conservation import ConservationReport
from labn.lrp.rules.linear_layers import Layer
from labn.lrp.rules.weighted_layer import WeightedLayer
from labn.lrp.weight_transforms import Flat, Gamma, Identity, Negative, Positive, Square, WeightTransform


@dataclass
class Step:
    """One layer of one propagation.

    Attributes:
        layer: weights and options; of a product with weights per image, those of these images.
        a: (B, in, ...) what the layer was given.
        z: (B, out, ...) what it made before its BatchNorm (after it, when folded); None if no rule asked for it.
        r: (T, out, ...) relevance at its output; T = B, or any T when B = 1.
        non_negative: a >= 0 is known.
        config, conservation: choices, and the account to fill in (None: not wanted).
        unit: (1 or B, in, ...) what a first layer has in place of an image of ones; None: ones.
        bounds: what it has in place of the lowest and the highest pixels; None: those.
        denominators: z + e by part, kept by the forward pass where many relevances meet one input (None: not kept).
    """

    layer: Layer | WeightedLayer
    a: Tensor
    z: Tensor | None
    r: Tensor
    non_negative: bool
    config: Config
    conservation: ConservationReport | None = None
    denominators: dict[WeightTransform, Tensor] | None = None
    unit: Tensor | None = None
    bounds: Sequence[Tensor] | None = None

    def apply(self, a: Tensor, transform: WeightTransform) -> Tensor:
        """sum_i a_i rho(w_ij), without bias; for the parts see `labn.lrp.weighted_product.part_of`."""
        return self.layer.apply(a, transform, self.config.folded)

    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """sum_j rho(w_ij) s_j."""
        return self.layer.adjoint(s, transform, self.config.folded, self.a)

    def divide(self, z: Tensor, r: Tensor | None = None) -> Tensor:
        """s = R / (z + e)."""
        return divide(self.r if r is None else r, z, self.config, self.conservation)

    def share(self, transform: WeightTransform, z: Callable[[], Tensor], r: Tensor) -> Tensor:
        """`divide` by the z of a part of the contributions, which is made at its first use only."""
        if self.denominators is None:
            return self.divide(z(), r)
        if transform not in self.denominators:
            made = z()
            self.denominators[transform] = stabiliser(made, self.config).add_(made)
        return r / self.denominators[transform]

    def uniform(self, transform: WeightTransform) -> Tensor:
        """R_i = u_i sum_j rho(w_ij) R_j / sum_i' u_i' rho(w_i'j), whatever the pixels; u = 1 but behind padding."""
        if self.unit is None:
            return self.adjoint(self.divide(self.apply(torch.ones_like(self.a[:1]), transform)), transform)
        return self.unit * self.adjoint(self.divide(self.apply(self.unit, transform)), transform)


def stabiliser(z: Tensor, config: Config) -> Tensor:
    """e of z (B, ...), with z's sign (+ at zero): `eps`, or `eps` times the sample's mean |z| when relative."""
    absolute = z.abs()
    if config.eps_mode == "relative":
        size = absolute.mean(dim=tuple(range(1, z.ndim)), keepdim=True).mul_(config.eps).clamp_(min=1e-30)
    else:
        size = z.new_full((), config.eps)
    return torch.copysign(size, z, out=absolute)


def divide(r: Tensor, z: Tensor, config: Config, conservation: ConservationReport | None) -> Tensor:
    """s = R / (z + e), booking what e keeps."""
    e = stabiliser(z, config)
    if conservation is None:
        return torch.div(r, e.add_(z), out=e) if r.shape == e.shape else r / e.add_(z)
    s = r / (z + e)
    conservation.stabilised(z, s * e)
    return s


def lrp0(step: Step) -> Tensor:
    """LRP-0: R_i = a_i sum_j w_ij R_j / z_j; nothing passes where z_j = 0."""
    z = _output(step)
    s = torch.where(z == 0, 0, step.r / torch.where(z == 0, 1, z))
    if step.conservation is not None:
        step.conservation.stabilised(z, torch.where(z == 0, step.r, 0))
    _book_bias(step, s)
    return step.a * step.adjoint(s, Identity())


def epsilon(step: Step) -> Tensor:
    """R_i = a_i sum_j w_ij R_j / (z_j + e sign(z_j)), the bias a part of z."""
    s = step.divide(_output(step))
    _book_bias(step, s)
    return step.a * step.adjoint(s, Identity())


def zplus(step: Step) -> Tensor:
    """R_i = sum_j (a_i w_ij)+ R_j / sum_i' (a_i' w_i'j)+, the bias left out (alpha-beta with 1 and 0)."""
    if not step.non_negative:
        return _signed_share(step, step.r, Positive())
    if len(step.r) != len(step.a):
        return _signed_share(step, step.r, Positive())
    return step.adjoint(_divide_positive(step, step.apply(step.a, Positive())), Positive()).mul_(step.a)


def alphabeta(step: Step) -> Tensor:
    """alpha times the share of positive contributions minus beta times the share of negative ones."""
    positive = _signed_share(step, step.config.alpha * step.r, Positive())
    return positive + _signed_share(step, -step.config.beta * step.r, Negative())


def gamma(step: Step) -> Tensor:
    """LRP-gamma: w + gamma w+ in place of w (for a < 0: w + gamma w-), the bias changed alike."""
    plus, minus = Gamma(step.config.gamma), Gamma(step.config.gamma, -1)
    bias = step.layer.offset(step.config.folded)
    z = step.apply(step.a.clamp(min=0), plus)
    z = z if step.non_negative else z + step.apply(step.a.clamp(max=0), minus)
    lifted = None if bias is None else step.layer.per_channel(plus(bias))
    s = step.divide(z if lifted is None else z + lifted)
    if step.conservation is not None and lifted is not None:
        step.conservation.biased(s * lifted)
    r = step.a.clamp(min=0) * step.adjoint(s, plus)
    return r if step.non_negative else r + step.a.clamp(max=0) * step.adjoint(s, minus)


def flat(step: Step) -> Tensor:
    """Every input of a window gets the same share: a and w replaced by 1."""
    return step.uniform(Flat())


def wsquare(step: Step) -> Tensor:
    """The w^2 rule: R_i = sum_j w_ij^2 R_j / sum_i' w_i'j^2, whatever the pixels (Montavon et al. 2017)."""
    return step.uniform(Square())


def ones(step: Step) -> Tensor:
    """z+ with the activation replaced by ones, so that the share does not depend on the pixels (ECCV 2024)."""
    return step.uniform(Positive())


def zbox(step: Step) -> Tensor:
    """zB: contributions a w - l w+ - h w- of pixels between l and h (Montavon et al. 2017)."""
    low, high = (b.expand_as(step.a) for b in step.bounds or step.config.bounds(step.a))
    terms: list[tuple[Tensor, WeightTransform]] = [(step.a, Identity()), (-low, Positive()), (-high, Negative())]
    s = step.divide(torch.stack([step.apply(a, rho) for a, rho in terms]).sum(0))
    return torch.stack([a * step.adjoint(s, rho) for a, rho in terms]).sum(0)


RULES: dict[str, Callable[[Step], Tensor]] = {
    "lrp0": lrp0, "epsilon": epsilon, "zplus": zplus, "alphabeta": alphabeta, "gamma": gamma, "flat": flat,
    "ones": ones, "zbox": zbox, "alpha1beta0": zplus, "wsquare": wsquare,
}  # fmt: skip

# These divide by what the layer made, so the forward pass keeps it.
USES_OUTPUT = {"lrp0", "epsilon"}


def _output(step: Step) -> Tensor:
    if step.z is None:
        raise InputError("This rule divides by the layer's output, which the forward pass did not keep.")
    return step.z


def _book_bias(step: Step, s: Tensor) -> None:
    bias = step.layer.offset(step.config.folded)
    if step.conservation is not None and bias is not None:
        step.conservation.biased(s * step.layer.per_channel(bias))


def _signed_share(step: Step, r: Tensor, same: WeightTransform) -> Tensor:
    """Share r by (a w)+ for `same`='plus', by (a w)- for 'minus': a+ meets `same` weights and a- the `other` ones."""
    if step.non_negative:
        return step.a * step.adjoint(step.share(same, lambda: step.apply(step.a, same), r), same)
    other, up, down = same.mirrored, step.a.clamp(min=0), step.a.clamp(max=0)
    s = step.share(same, lambda: step.apply(up, same) + step.apply(down, other), r)
    return up * step.adjoint(s, same) + down * step.adjoint(s, other)


def _divide_positive(step: Step, z: Tensor) -> Tensor:
    """`divide` for a fresh z >= 0: in place where no account is kept."""
    if step.conservation is not None:
        return step.divide(z)
    if step.config.eps_mode == "absolute":
        return torch.div(step.r, z.add_(step.config.eps), out=z)
    size = z.mean(dim=tuple(range(1, z.ndim)), keepdim=True).mul_(step.config.eps).clamp_(min=1e-30)
    return torch.div(step.r, z.add_(size), out=z)
