"""Where a detection's relevance starts: the contrasts of CRP at the input of a detector's heads (IJCNN 2019).

Every function takes contributions c (n, I), c_ki = x_i w_ik of input i to output k of one default box, and returns the
relevance (I,) of the inputs. Biases take no part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def share(contributions: Tensor) -> Tensor:
    """Positive contributions c+ / sum c+ over the last dimension (the w+ rule for one unit of relevance).

    All zero where nothing contributes, so that the sum is 0 instead of 1 there.
    """
    positive = contributions.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / torch.where(total > 0, total, 1), 0)


def class_shares(c: Tensor, target: int, rivals: Tensor) -> Tensor:
    """R_i = R_i[k*] - mean over the rivals k of R_i[k], R_i[k] = c+_ki / sum c+_k; sums to 0.

    Args:
        c: (K, I) contributions.
        target: k*.
        rivals: (K,) bool.
    """
    shares = share(c)
    return shares[target] - shares[rivals].mean(0)


def class_output(c: Tensor, target: int, rivals: Tensor) -> Tensor:
    """The contrast taken at the output, as one unit z_k* - mean z_k with weights w_k* - mean w_k (cf. CLRP, 2018).

    Its positive shares minus its negative shares; classes with larger weights weigh more. Arguments as `class_shares`.
    """
    return opposite(c[target] - c[rivals].mean(0))


def class_alone(c: Tensor, target: int, rivals: Tensor) -> Tensor:
    """No contrast, plain alpha1-beta0 propagation: R_i = R_i[k*]; sums to 1. Arguments as `class_shares`."""
    return share(c[target])


def opposite(c: Tensor) -> Tensor:
    """R_i = c+_i / sum c+ - c-_i / sum c-: the share of what pushes the output up minus that of what pushes it down.

    The classification rule for two classes with weights w and -w, a coordinate having no other rival than its own
    opposite; sums to 0 where both signs occur.
    """
    return share(c) - share(-c)


CLASS_RULES: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "source": class_shares,
    "output": class_output,
    "none": class_alone,
}

# (contributions (4, I) of cx, cy, w, h; which coordinate) -> (I,)
COORDINATE_RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "opposite": lambda c, t: opposite(c[t]),
    "others": lambda c, t: share(c[t]) - share(torch.cat([c[:t], c[t + 1 :]])).mean(0),
    "none": lambda c, t: share(c[t]),
    "eps": lambda c, t: c[t] / _stable(c[t].sum(), c[t]),
    "alpha2beta1": lambda c, t: 2 * share(c[t]) - share(-c[t]),
}


def _stable(z: Tensor, c: Tensor) -> Tensor:
    """z moved away from zero by 1e-9 of the mean |c|."""
    size = (1e-9 * c.abs().mean()).clamp(min=1e-30)
    return z + torch.copysign(size, z)
