"""Change of a class's probability when the model sees the image through its map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labn.errors import InputError

ROUNDING = 1e-6  # error of a probability that is computed from float32 logits


def confidence_drop(whole: Tensor, shown: Tensor) -> Tensor:
    """Drop of a probability in percent, 100 max(0, Y - O) / Y (Chattopadhay et al., WACV 2018, section 4.1).

    The paper's Average Drop is the mean over the images.

    Args:
        whole: Y, any shape: probability of the class on the whole image.
        shown: O, the same shape: probability of the class on the image multiplied by its map.

    Returns:
        The same shape, in [0, 100]; 0 where Y is 0.

    Example:
        >>> confidence_drop(torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.9]))
        tensor([25.0000,  0.0000])
    """
    return 100 * (whole - shown).clamp(min=0) / torch.where(whole > 0, whole, 1)


def confidence_increase(whole: Tensor, shown: Tensor) -> Tensor:
    """100 where O > Y, else 0; the mean is the Percent Increase in Confidence (Chattopadhay et al., section 4.1).

    Args:
        whole: Y, any shape: probability of the class on the whole image.
        shown: O, the same shape: probability of the class on the image multiplied by its map.

    Returns:
        The same shape, 0 or 100; NaN where Y or O is NaN.

    Example:
        >>> confidence_increase(torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.9]))
        tensor([  0., 100.])
    """
    increase = shown - whole
    # A map that hides nothing has O = Y up to the last digits of two forwards, which must not count as an increase.
    return torch.where(increase.isnan(), increase, 100 * (increase > ROUNDING).to(whole.dtype))


def adcc(coherency: Tensor, complexity: Tensor, drop: Tensor) -> Tensor:
    """Harmonic mean of coherency, 1 - complexity and 1 - drop (Poppi et al., CVPR Workshops 2021).

    Args:
        coherency: any shape, in [0, 1].
        complexity: the same shape, in [0, 1].
        drop: the same shape, as a share in [0, 1] and not in percent.

    Returns:
        The same shape, in [0, 1]; 0 where one of the three terms is 0.

    Example:
        >>> adcc(torch.tensor([0.9, 0.9]), torch.tensor([0.2, 0.2]), torch.tensor([0.1, 1.0]))
        tensor([0.8640, 0.0000])
    """
    # 1 / 0 is infinite and 3 / inf is 0, which is the limit of the harmonic mean; rounding below 0 is clipped first.
    terms = torch.stack([coherency, 1 - complexity, 1 - drop]).clamp(min=0)
    return 3 / (1 / terms).sum(0)


def percent_counts(pixels: int, percents: Sequence[float]) -> Tensor:
    """Number of pixels of each percentage, rounded half up, at least one.

    Args:
        pixels: number of pixels of the image.
        percents: K percentages, each above 0 and at most 100.

    Returns:
        (K,) int64.

    Raises:
        InputError: a percentage outside (0, 100], or an empty list.

    Example:
        >>> percent_counts(10, [1, 25, 50])
        tensor([1, 3, 5])
    """
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise InputError(f"percents must be above 0 and at most 100, got {list(percents)}.")
    # Half up, as Python's round() would take 12.5 % and 37.5 % of 100 pixels to the even neighbour.
    return torch.tensor([max(1, int(pixels * percent / 100 + 0.5)) for percent in percents])
