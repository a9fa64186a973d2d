"""Iterative removal of superpixels: the order of the segments, and the area over the curve."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_means(maps: Tensor, segments: Tensor) -> Tensor:
    """Mean of a map on every segment.

    Args:
        maps: (B, H, W).
        segments: (B, H, W) int64, from 0.

    Returns:
        (B, L) float64 for the largest number L of segments of an image; NaN for numbers that an image lacks.

    Example:
        >>> segment_means(torch.tensor([[[1.0, 3.0, 5.0]]]), torch.tensor([[[0, 0, 1]]]))
        tensor([[2., 5.]], dtype=torch.float64)
    """
    numbers, values = segments.flatten(1), maps.double().flatten(1)
    empty = values.new_zeros(len(maps), int(segments.max()) + 1)
    sums = empty.scatter_add(1, numbers, values)
    counts = empty.scatter_add(1, numbers, torch.ones_like(values))
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan)


def segment_ranks(means: Tensor) -> Tensor:
    """Number (B, L) int64 of segments with a higher mean, by which segments leave together where their means are equal.

    Args:
        means: (B, L), as from `segment_means`; NaN gets the rank L.

    Example:
        >>> segment_ranks(torch.tensor([[2.0, 5.0, 2.0, 1.0]]))
        tensor([[1, 0, 1, 3]])
    """
    low = torch.where(means.isnan(), -torch.inf, means)
    ordered = low.sort(1).values
    above = means.shape[1] - torch.searchsorted(ordered, low.contiguous(), right=True)
    return torch.where(means.isnan(), means.shape[1], above)


def area_over_curve(x: Tensor, probabilities: Tensor) -> Tensor:
    """1 - area under p / p[0] by the trapezoid rule: the area over the degradation curve (Rieger and Hansen 2020).

    Args:
        x: (B, K) ascending share of the removed segments, from 0 to 1.
        probabilities: (B, K).

    Returns:
        (B,) float64, at most 1: 0 where removal changes nothing, negative where the probability rises; NaN where p[0]
        is 0.

    Example:
        >>> area_over_curve(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.8, 0.4, 0.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    p = probabilities.double()
    whole = p[:, :1]
    relative = torch.where(whole > 0, p / torch.where(whole > 0, whole, 1), torch.nan)
    return 1 - torch.trapezoid(relative, x.double(), dim=1)
