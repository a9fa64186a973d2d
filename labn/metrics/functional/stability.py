"""Change of a map, relative to its size."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_changes(maps: Tensor, changed: Tensor) -> Tensor:
    """|changed - map| / |map| with Frobenius' norm.

    Args:
        maps: (B, H, W).
        changed: (B, H, W).

    Returns:
        (B,) float64, at least 0; NaN for a map of zeros.

    Example:
        >>> relative_changes(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 3.0]]]))
        tensor([0.2000], dtype=torch.float64)
    """
    before, after = maps.double().flatten(1), changed.double().flatten(1)
    size = before.norm(dim=1)
    return torch.where(size > 0, (after - before).norm(dim=1) / torch.where(size > 0, size, 1), torch.nan)
