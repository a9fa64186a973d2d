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
