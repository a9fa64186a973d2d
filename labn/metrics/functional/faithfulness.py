"""Agreement of sums of a map with what the output loses: completeness, sensitivity-n and infidelity."""

from __future__ import annotations

import torch
from torch import Tensor

from labn.metrics.functional.similarity import correlation


def completeness_gap(maps: Tensor, drops: Tensor) -> Tensor:
    """Relative gap |sum of the map - d| / |d| to the whole drop d = f(x) - f(fill) (Sundararajan et al., ICML 2017).

    Args:
        maps: (B, H, W).
        drops: (B,), f of the image minus f of the fill that the maps start from.

    Returns:
        (B,) float64, 0 for a complete map; NaN where the drop is 0.

    Example:
        >>> completeness_gap(torch.ones(2, 1, 3), torch.tensor([3.0, 4.0]))
        tensor([0.0000, 0.2500], dtype=torch.float64)
    """
    drops = drops.double()
    gap = (maps.double().flatten(1).sum(1) - drops).abs() / drops.abs()
    return torch.where(drops != 0, gap, torch.nan)


def subset_correlation(sums: Tensor, drops: Tensor) -> Tensor:
    """Sensitivity-n: Pearson's correlation over random sets between the map's sum on a set and what the output loses.

    Args:
        sums: (B, K, D), sums of the map over D sets of each of K sizes.
        drops: (B, K, D), f(x) - f(x without the set).

    Returns:
        (B,) float64 in [-1, 1], mean over the sizes (Ancona et al., ICLR 2018); a size at which all sums or all drops
        are equal counts 0.

    Example:
        >>> subset_correlation(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0.5, 1.0, 1.5]]]))
        tensor([1.], dtype=torch.float64)
    """
    sums, drops = sums.double(), drops.double()
    flat = (sums == sums[..., :1]).all(-1) | (drops == drops[..., :1]).all(-1)
    values = correlation(sums.flatten(0, 1)[:, None], drops.flatten(0, 1)[:, None]).view(sums.shape[:2])
    return torch.where(flat, 0, values).mean(1)


def scaled_infidelity(sums: Tensor, drops: Tensor) -> Tensor:
    """Infidelity min_b E[(b s - d)^2] = E[d^2] - E[s d]^2 / E[s^2] over random sets (Yeh et al., NeurIPS 2019).

    The optimal scale b makes maps of any unit comparable, as in the paper's experiments.

    Args:
        sums: s (B, ...), sums of the map over random sets of pixels.
        drops: d, the same shape, f(x) - f(x without the set).

    Returns:
        (B,) float64, at least 0, in squared units of f; E[d^2] for a map of zeros.

    Example:
        >>> scaled_infidelity(torch.tensor([[1.0, 2.0], [1.0, -1.0]]), torch.tensor([[3.0, 6.0], [2.0, 2.0]]))
        tensor([0., 4.], dtype=torch.float64)
    """
    s, d = sums.double().flatten(1), drops.double().flatten(1)
    power = s.square().mean(1)
    explained = (s * d).mean(1).square() / torch.where(power > 0, power, 1)
    return (d.square().mean(1) - explained).clamp(min=0)
