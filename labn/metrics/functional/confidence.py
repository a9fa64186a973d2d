"""How the probability of a class changes when only part of the image is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labn.errors import InputError

ROUNDING = 1e-6  # of a probability, from float32 logits


def confidence_drop(whole: Tensor, shown: Tensor) -> Tensor:
    """100 max(0, Y - O) / Y in percent, whose mean is Average Drop (Chattopadhay et al., WACV 2018, section 4.1).

    Args:
        whole: Y, any shape: probability of the class on the whole image.
        shown: O, the same shape: on what the map shows of it.

    Returns:
        The same shape, in [0, 100]; 0 where Y is 0 and nothing can drop.
    """
    return 100 * (whole - shown).clamp(min=0) / torch.where(whole > 0, whole, 1)


def confidence_increase(whole: Tensor, shown: Tensor) -> Tensor:
    """100 where O > Y, else 0: its mean is the Percent Increase in Confidence (the same paper).

    O must exceed Y by more than `ROUNDING`, or the last digits of a forward would decide where the map hides nothing.
    NaN where either is. Arguments as in `confidence_drop`.
    """
    increase = shown - whole
    return torch.where(increase.isnan(), increase, 100 * (increase > ROUNDING).to(whole.dtype))


def adcc(coherency: Tensor, complexity: Tensor, drop: Tensor) -> Tensor:
    """Harmonic mean of coherency, 1 - complexity and 1 - drop (Poppi et al., CVPR Workshops 2021), 0 where one is 0.

    Args:
        coherency: any shape, in [0, 1].
        complexity: the same shape, in [0, 1].
        drop: the same shape, a share in [0, 1], not in percent.

    Returns:
        The same shape, in [0, 1].
    """
    terms = torch.stack([coherency, 1 - complexity, 1 - drop]).clamp(min=0)
    return 3 / (1 / terms).sum(0)


def percent_counts(pixels: int, percents: Sequence[float]) -> Tensor:
    """(K,) int64 numbers of pixels that each percentage of `pixels` stands for: rounded, at least one.

    Raises:
        ValueError: a percentage that is not above 0 and at most 100.
    """
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise InputError(f"percents must be above 0 and at most 100, got {list(percents)}.")
    return torch.tensor([max(1, int(pixels * percent / 100 + 0.5)) for percent in percents])
