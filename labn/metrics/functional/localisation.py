"""Agreement of importance maps with ground-truth regions; definitions follow Quantus (Hedström et al., JMLR 2023).

Where values are tied, every function gives the expectation over a random order of the ties, so that a constant map
scores what chance scores. A sample whose region is empty gets NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.functional.similarity import midranks


def boxes_to_masks(boxes: Sequence[Tensor] | Tensor, size: tuple[int, int]) -> Tensor:
    """Union of boxes as masks: a pixel is inside where its centre is.

    Args:
        boxes: per sample (n, 4) pixel coordinates x1, y1, x2, y2; or (B, n, 4), boxes without area being padding.
        size: (H, W).

    Returns:
        (B, H, W) bool; nothing is inside where a sample has no box.

    Raises:
        ValueError: boxes of a sample that are not (n, 4).
    """
    for sample, one in enumerate(boxes):
        if one.ndim != 2 or one.shape[1] != 4:
            raise InputError(f"boxes must be one (n, 4) tensor per image, got {tuple(one.shape)} for image {sample}.")
    return torch.stack([_union(one, size) for one in boxes])


def _union(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    rows, columns = (y >= y1) & (y < y2), (x >= x1) & (x < x2)
    return (rows[:, :, None] & columns[:, None, :]).any(0)


def _flat(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if maps.shape != masks.shape:
        raise InputError(f"masks must be {tuple(maps.shape)} like the maps, got {tuple(masks.shape)}.")
    return maps.double().flatten(1), masks.bool().flatten(1)


def _left_out(scores: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, scores, torch.nan)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 where the map's maximum lies in the region, else 0 (Zhang et al., ECCV 2016); the share of tied maxima inside.

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1], NaN where the region is empty.
    """
    values, inside = _flat(maps, masks)
    maxima = values == values.amax(1, keepdim=True)
    return _left_out((maxima & inside).sum(1) / maxima.sum(1).double(), inside.any(1))


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance mass accuracy: sum of relevance inside / sum of relevance (Arras et al., Information Fusion 2022).

    Only the positive part counts, as a negative value argues against the class; a map without any positive value
    has put no mass inside and scores 0. Arguments and result as in `pointing_game`.
    """
    values, inside = _flat(maps, masks)
    positive = values.clamp(min=0)
    total = positive.sum(1)
    mass = torch.where(inside, positive, 0).sum(1) / torch.where(total > 0, total, 1)
    return _left_out(mass, inside.any(1))


def relevance_rank(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance rank accuracy: share of the |region| highest pixels that lie inside (Arras et al. 2022).

    Arguments and result as in `pointing_game`.
    """
    values, inside = _flat(maps, masks)
    size = inside.sum(1, keepdim=True)
    threshold = values.sort(1, descending=True).values.gather(1, (size - 1).clamp(min=0))
    above, tied = values > threshold, values == threshold
    places = (size - above.sum(1, keepdim=True)).double() / tied.sum(1, keepdim=True)
    hits = (above & inside).sum(1) + (tied & inside).sum(1) * places.squeeze(1)
    return _left_out(hits / size.squeeze(1).clamp(min=1), inside.any(1))


def map_auroc(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under the ROC curve of the map as a detector of region pixels, U / (n_in n_out) (Mann and Whitney 1947).

    Returns:
        (B,) float64 in [0, 1], 0.5 for a map without relation; NaN where the region is empty or everything.
    """
    values, inside = _flat(maps, masks)
    positive = inside.sum(1).double()
    negative = inside.shape[1] - positive
    rank_sum = torch.where(inside, midranks(values), 0).sum(1)
    wins = rank_sum - positive * (positive + 1) / 2
    return _left_out(wins / (positive * negative).clamp(min=1), (positive > 0) & (negative > 0))
