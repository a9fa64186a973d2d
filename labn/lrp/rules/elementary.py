"""The rules of layer-wise relevance propagation, one small function each.

With z_j = sum_i a_i w_ij + b_j every rule is R_i = a_i sum_j rho(w_ij) R_j / (z~_j + e_j) (Bach et al. 2015; Montavon
et al. 2019). Four steps compute it: apply rho(w), divide, apply the transpose of rho(w), multiply by a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labn.lrp.config import Config
from labn.lrp.rules.conservation import ConservationReport
from labn.lrp.rules.linear_layers import Layer
from labn.lrp.rules.weighted_layer import WeightedLayer
from labn.lrp.tracing.weights_of_calls import Contraction
from labn.lrp.weight_transforms import Flat, Gamma, Identity, Negative, Positive, Square, WeightTransform


@dataclass
class Step:
    """One layer in one propagation: the arguments of a rule.

    Attributes:
        layer: weights and options; for a product with weights per image, the weights of these images.
        a: (B, in, ...) input of the layer.
        z: (B, out, ...) output before the BatchNorm, or after it when BatchNorm is folded; None if the rule does not
            divide by it.
        r: (T, out, ...) relevance at the output; T = B, or any T if B = 1.
        non_negative: whether a >= 0 is known.
        config, conservation: the choices, and the conservation report to fill (None: none is wanted).
        unit: (1 or B, in, ...) input of a first layer for an all-ones image; None: all ones.
        bounds: inputs of a first layer for the lowest and for the highest pixels; None: these pixels.
        denominators: weight transform -> z + e, kept where many relevance maps share one input (None: not kept).
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
        """sum_i a_i rho(w_ij) without the bias."""
        return self.layer.apply(a, transform, self.config.folded)

    def adjoint(self, s: Tensor, transform: WeightTransform) -> Tensor:
        """sum_j rho(w_ij) s_j."""
        return self.layer.adjoint(s, transform, self.config.folded, self.a)

    def divide(self, z: Tensor, r: Tensor | None = None) -> Tensor:
        """s = R / (z + e)."""
        return divide(self.r if r is None else r, z, self.config, self.conservation)

    def share(self, transform: WeightTransform, z: Callable[[], Tensor], r: Tensor) -> Tensor:
        """R / (z + e) for the contributions under a transform; `z` is called only where z + e is not kept yet."""
        # One z + e serves the sweeps of all relevance maps of an image; without them it would only take memory.
        if self.denominators is None:
            return self.divide(z(), r)
        if transform not in self.denominators:
            total = z()
            self.denominators[transform] = stabiliser(total, self.config).add_(total)
        return r / self.denominators[transform]

    def uniform(self, transform: WeightTransform) -> Tensor:
        """R_i = u_i sum_j rho(w_ij) R_j / sum_i' u_i' rho(w_i'j), independent of the pixels.

        u is the layer's input for an all-ones image: 1, except where padding or pooling comes before the layer.
        """
        if self.unit is None:
            return self.adjoint(self.divide(self.apply(torch.ones_like(self.a[:1]), transform)), transform)
        return self.unit * self.adjoint(self.divide(self.apply(self.unit, transform)), transform)


def stabiliser(z: Tensor, config: Config) -> Tensor:
    """The stabiliser e of z (B, ...), with the sign of z (+ at zero): `eps`, or `eps` times the sample's mean |z|."""
    absolute = z.abs()
    if config.eps_mode == "relative":
        # 1e-30 keeps an all-zero layer from 0 / 0.
        size = absolute.mean(dim=tuple(range(1, z.ndim)), keepdim=True).mul_(config.eps).clamp_(min=1e-30)
    else:
        size = z.new_full((), config.eps)
    return torch.copysign(size, z, out=absolute)


def divide(r: Tensor, z: Tensor, config: Config, conservation: ConservationReport | None) -> Tensor:
    """s = R / (z + e); the relevance that e keeps goes into the conservation report."""
    e = stabiliser(z, config)
    if conservation is None:
        return torch.div(r, e.add_(z), out=e) if r.shape == e.shape else r / e.add_(z)
    s = r / (z + e)
    conservation.stabilised(z, s * e)
    return s


def lrp0(step: Step) -> Tensor:
    """LRP-0: R_i = a_i sum_j w_ij R_j / z_j, where outputs with z_j = 0 pass no relevance (Bach et al. 2015)."""
    z = _output(step)
    # The inner `where` keeps 0 / 0 out of the quotient; the outer one drops its value.
    s = torch.where(z == 0, 0, step.r / torch.where(z == 0, 1, z))
    if step.conservation is not None:
        step.conservation.stabilised(z, torch.where(z == 0, step.r, 0))
    _book_bias(step, s)
    return step.a * step.adjoint(s, Identity())


def epsilon(step: Step) -> Tensor:
    """LRP-epsilon: R_i = a_i sum_j w_ij R_j / (z_j + e sign(z_j)), where z includes the bias."""
    s = step.divide(_output(step))
    _book_bias(step, s)
    return step.a * step.adjoint(s, Identity())


def zplus(step: Step) -> Tensor:
    """z+: R_i = sum_j (a_i w_ij)+ R_j / sum_i' (a_i' w_i'j)+ without the bias; alpha-beta with alpha 1 and beta 0."""
    fallback = dead_fallback(step)
    if fallback is not None:
        return _with_fallback(step, fallback)
    if not step.non_negative or len(step.r) != len(step.a) or step.config.biases:
        return _signed_share(step, step.r, Positive())
    # The common case behind a ReLU: in place on fresh tensors.
    return step.adjoint(_divide_positive(step, step.apply(step.a, Positive())), Positive()).mul_(step.a)


def dead_fallback(step: Step) -> Callable[[Step], Tensor] | None:
    """The shares of units without positive contribution under z+; None: such a unit keeps its relevance."""
    recorded = isinstance(step.layer, WeightedLayer) and isinstance(step.layer.weights, Contraction)
    name = step.config.dead or ("absolute" if recorded else "keep")
    return FALLBACKS.get(name)


def _with_fallback(step: Step, fallback: Callable[[Step], Tensor]) -> Tensor:
    """z+ where there are positive contributions, the fallback's shares elsewhere."""
    lifted = _bias_under(step, Positive())
    up, down = step.a.clamp(min=0), step.a.clamp(max=0)
    z = _with_bias(step.apply(up, Positive()) + step.apply(down, Negative()), lifted)
    dead = z == 0
    alive = replace(step, r=torch.where(dead, 0, step.r), config=replace(step.config, dead="keep"))
    shared = zplus(alive)
    lost = torch.where(dead, step.r, 0)
    return shared + fallback(replace(step, r=lost)) if bool(lost.any()) else shared


def absolute(step: Step) -> Tensor:
    """R_i = |a_i| sum_j |w_ij| R_j / sum_i' |a_i'| |w_i'j|.

    Where all contributions have one sign, as at a unit without positive ones, this is LRP-epsilon without the bias.
    """
    size = step.a.abs()
    s = step.divide(step.apply(size, Positive()) - step.apply(size, Negative()))
    return size * (step.adjoint(s, Positive()) - step.adjoint(s, Negative()))


def uniform(step: Step) -> Tensor:
    """Equal shares for all inputs of a window."""
    return step.adjoint(step.divide(step.apply(torch.ones_like(step.a), Flat())), Flat())


FALLBACKS: dict[str, Callable[[Step], Tensor]] = {"absolute": absolute, "uniform": uniform}


def alphabeta(step: Step) -> Tensor:
    """alpha-beta: alpha times the shares of positive contributions minus beta times those of negative ones."""
    # The second term divides by the negative sum, so its shares are positive and -beta makes them subtract.
    positive = _signed_share(step, step.config.alpha * step.r, Positive())
    return positive + _signed_share(step, -step.config.beta * step.r, Negative())


def gamma(step: Step) -> Tensor:
    """LRP-gamma: weights w + gamma w+, or w + gamma w- where a < 0; the bias b becomes b + gamma b+ (Montavon 2019)."""
    plus, minus = Gamma(step.config.gamma), Gamma(step.config.gamma, -1)
    bias = step.layer.offset(step.config.folded)
    # a+ with w + gamma w+ and a- with w + gamma w- strengthen the positive contributions in both cases.
    z = step.apply(step.a.clamp(min=0), plus)
    z = z if step.non_negative else z + step.apply(step.a.clamp(max=0), minus)
    lifted = None if bias is None else step.layer.per_channel(plus(bias))
    s = step.divide(z if lifted is None else z + lifted)
    if step.conservation is not None and lifted is not None:
        step.conservation.biased(s * lifted)
    r = step.a.clamp(min=0) * step.adjoint(s, plus)
    return r if step.non_negative else r + step.a.clamp(max=0) * step.adjoint(s, minus)


def flat(step: Step) -> Tensor:
    """Flat: every input of a window gets the same share; a and w are replaced by 1."""
    return step.uniform(Flat())


def wsquare(step: Step) -> Tensor:
    """w^2: R_i = sum_j w_ij^2 R_j / sum_i' w_i'j^2, independent of the pixels (Montavon et al. 2017)."""
    return step.uniform(Square())


def ones(step: Step) -> Tensor:
    """z+ with activations replaced by ones, so that the shares do not depend on the pixels (ECCV 2024)."""
    return step.uniform(Positive())


def zbox(step: Step) -> Tensor:
    """z-box (zB): contributions a w - l w+ - h w- of pixels between l and h (Montavon et al. 2017)."""
    # a w - l w+ - h w- >= 0 for every pixel l <= a <= h, so that all shares are positive.
    low, high = (b.expand_as(step.a) for b in step.bounds or step.config.bounds(step.a))
    terms: list[tuple[Tensor, WeightTransform]] = [(step.a, Identity()), (-low, Positive()), (-high, Negative())]
    s = step.divide(torch.stack([step.apply(a, rho) for a, rho in terms]).sum(0))
    return torch.stack([a * step.adjoint(s, rho) for a, rho in terms]).sum(0)


RULES: dict[str, Callable[[Step], Tensor]] = {
    "lrp0": lrp0, "epsilon": epsilon, "zplus": zplus, "alphabeta": alphabeta, "gamma": gamma, "flat": flat,
    "ones": ones, "zbox": zbox, "alpha1beta0": zplus, "wsquare": wsquare,
}  # fmt: skip

# Rules that divide by the output z itself, which the forward pass keeps for them.
USES_OUTPUT = {"lrp0", "epsilon"}


def _output(step: Step) -> Tensor:
    if step.z is None:
        raise RuntimeError(
            "The rule divides by the layer's output, which the forward pass did not keep; see USES_OUTPUT."
        )
    return step.z


def _book_bias(step: Step, s: Tensor) -> None:
    bias = step.layer.offset(step.config.folded)
    if step.conservation is not None and bias is not None:
        step.conservation.biased(s * step.layer.per_channel(bias))


def _signed_share(step: Step, r: Tensor, same: WeightTransform) -> Tensor:
    """Divide r by the shares of (a w)+ for `same` = Positive(), of (a w)- for Negative().

    (a w)+ = a+ w+ + a- w-, so activations of either sign are combined with weights of the matching sign.
    """
    lifted = _bias_under(step, same)
    if step.non_negative:
        s = step.share(same, lambda: _with_bias(step.apply(step.a, same), lifted), r)
        _book_lifted(step, s, lifted)
        return step.a * step.adjoint(s, same)
    other, up, down = same.mirrored, step.a.clamp(min=0), step.a.clamp(max=0)
    s = step.share(same, lambda: _with_bias(step.apply(up, same) + step.apply(down, other), lifted), r)
    _book_lifted(step, s, lifted)
    return up * step.adjoint(s, same) + down * step.adjoint(s, other)


def _bias_under(step: Step, same: WeightTransform) -> Tensor | None:
    """The part of the bias that counts among the contributions of the sign of `same`; None without one."""
    bias = step.layer.offset(step.config.folded) if step.config.biases else None
    return None if bias is None else step.layer.per_channel(same(bias))


def _with_bias(z: Tensor, lifted: Tensor | None) -> Tensor:
    return z if lifted is None else z + lifted


def _book_lifted(step: Step, s: Tensor, lifted: Tensor | None) -> None:
    if step.conservation is not None and lifted is not None:
        step.conservation.biased(s * lifted)


def _divide_positive(step: Step, z: Tensor) -> Tensor:
    """`divide` for a new tensor z >= 0, in place unless the conservation report needs z."""
    if step.conservation is not None:
        return step.divide(z)
    if step.config.eps_mode == "absolute":
        return torch.div(step.r, z.add_(step.config.eps), out=z)
    # z >= 0: the mean is that of |z|, and the stabiliser needs no sign.
    size = z.mean(dim=tuple(range(1, z.ndim)), keepdim=True).mul_(step.config.eps).clamp_(min=1e-30)
    return torch.div(step.r, z.add_(size), out=z)
