"""Complexity of a map, which needs neither model nor ground truth."""

from __future__ import annotations

import torch
from torch import Tensor


def gini_index(maps: Tensor) -> Tensor:
    """Sparseness: the Gini index of the map's absolute values (Hurley and Rickard 2009; Chalasani et al., ICML 2020).

    G = sum_i (2 i - P - 1) |a|_(i) / (P sum_i |a|_i) with |a|_(1) <= ... <= |a|_(P).

    Args:
        maps: (B, H, W), P = H W.

    Returns:
        (B,) float64: 0 for a map whose absolute values are all the same (also all zero), 1 - 1 / P for a single pixel.

    Example:
        >>> gini_index(torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 5.0]]]))
        tensor([0.0000, 0.7500], dtype=torch.float64)
    """
    values = maps.double().abs().flatten(1).sort(1).values
    pixels = values.shape[1]
    rank = torch.arange(1, pixels + 1, dtype=torch.float64, device=maps.device)
    total = values.sum(1)
    # An all-zero map has the numerator 0: the denominator P then gives 0, as for every constant map, in place of 0 / 0.
    return ((2 * rank - pixels - 1) * values).sum(1) / (pixels * torch.where(total > 0, total, 1))


def histogram_entropy(maps: Tensor, bins: int = 100) -> Tensor:
    """Entropy, in nats, of the histogram of the map's values in `bins` equal bins between its extremes.

    Args:
        maps: (B, H, W).
        bins: number of bins.

    Returns:
        (B,) float64 in [0, log(bins)]: 0 for a map of one value, NaN for a map with NaN.

    Example:
        >>> histogram_entropy(torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]]), bins=4)
        tensor([1.3863, 0.0000], dtype=torch.float64)
    """
    values = maps.double().flatten(1)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    span = torch.where(high > low, high - low, 1)
    places = ((values - low) / span * bins).nan_to_num().long().clamp(0, bins - 1)
    counts = values.new_zeros(len(values), bins).scatter_add(1, places, torch.ones_like(values))
    return torch.special.entr(counts / values.shape[1]).sum(1).masked_fill(values.isnan().any(1), torch.nan)


def relative_rise(before: Tensor, after: Tensor) -> Tensor:
    """(after - before) / before (B,) float64, at least -1 for values of at least 0; NaN where `before` is 0 alone.

    Two zeros have no rise: 0.

    Example:
        >>> relative_rise(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([3.0, 0.0, 1.0]))
        tensor([0.5000, 0.0000,    nan], dtype=torch.float64)
    """
    rise = after.double() - before.double()
    return torch.where(before != 0, rise / torch.where(before != 0, before, 1), torch.where(rise == 0, 0.0, torch.nan))
