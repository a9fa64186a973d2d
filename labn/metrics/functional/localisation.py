"""Agreement of importance maps with ground-truth regions; definitions follow Quantus (Hedström et al., JMLR 2023).

Tied values: every function returns the expectation over a random order of the ties, so that a constant map gets the
score of chance. The score of a sample with an empty region is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.functional.similarity import midranks


def boxes_to_masks(boxes: Sequence[Tensor] | Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the union of boxes; a pixel belongs to a box that contains its centre.

    Args:
        boxes: per sample (n, 4) pixel coordinates x1, y1, x2, y2; or (B, n, 4), in which boxes
            without area are padding.
        size: (H, W).

    Returns:
        (B, H, W) bool; all False for a sample without a box.

    Raises:
        InputError: boxes of a sample that are not (n, 4).

    Example:
        >>> boxes_to_masks([torch.tensor([[0.0, 0.0, 2.0, 1.0]])], size=(2, 3)).int()
        tensor([[[1, 1, 0],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    for image, corners in enumerate(boxes):
        if corners.ndim != 2 or corners.shape[1] != 4:
            shape = tuple(corners.shape)
            raise InputError(f"boxes must be one (n, 4) tensor per image, got {shape} for image {image}.")
    return torch.stack([_union(corners, size) for corners in boxes])


def _union(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    # Pixel (0, 0) covers [0, 1) x [0, 1), so that its centre is at (0.5, 0.5).
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    rows, columns = (y >= y1) & (y < y2), (x >= x1) & (x < x2)
    return (rows[:, :, None] & columns[:, None, :]).any(0)


def _flat(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if maps.shape != masks.shape:
        raise InputError(f"masks must be {tuple(maps.shape)} like the maps, got {tuple(masks.shape)}.")
    return maps.double().flatten(1), masks.bool().flatten(1)


def _nan_unless(defined: Tensor, scores: Tensor) -> Tensor:
    return torch.where(defined, scores, torch.nan)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 where the map's maximum lies in the region, else 0 (Zhang et al., ECCV 2016).

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64: 0 or 1, or with several equal maxima the share of them inside; NaN where the region is empty.

    Example:
        >>> masks = torch.tensor([[[True, False]], [[True, False]]])
        >>> pointing_game(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]), masks)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    values, inside = _flat(maps, masks)
    # Equality is exact: the maximum is one of the values, not computed from them.
    maxima = values == values.amax(1, keepdim=True)
    return _nan_unless(inside.any(1), (maxima & inside).sum(1) / maxima.sum(1).double())


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance mass accuracy: sum of relevance inside / sum of relevance (Arras et al., Information Fusion 2022).

    Only positive relevance counts, because negative relevance argues against the class.

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1]; 0 for a map without a positive value, NaN where the region is empty.

    Example:
        >>> relevance_mass(torch.tensor([[[3.0, 1.0, -5.0]]]), torch.tensor([[[True, False, False]]]))
        tensor([0.7500], dtype=torch.float64)
    """
    values, inside = _flat(maps, masks)
    positive = values.clamp(min=0)
    total = positive.sum(1)
    mass = torch.where(inside, positive, 0).sum(1) / torch.where(total > 0, total, 1)
    return _nan_unless(inside.any(1), mass)


def relevance_rank(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance rank accuracy: share of the |region| highest pixels that lie inside (Arras et al. 2022).

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1]; NaN where the region is empty.

    Example:
        >>> relevance_rank(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[True, False, True]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    values, inside = _flat(maps, masks)
    size = inside.sum(1, keepdim=True)
    threshold = values.sort(1, descending=True).values.gather(1, (size - 1).clamp(min=0))
    above, tied = values > threshold, values == threshold
    # Pixels tied at the threshold share the remaining ranks: in a random order each is taken with this probability.
    taken = (size - above.sum(1, keepdim=True)).double() / tied.sum(1, keepdim=True)
    hits = (above & inside).sum(1) + (tied & inside).sum(1) * taken.squeeze(1)
    return _nan_unless(inside.any(1), hits / size.squeeze(1).clamp(min=1))


def map_auroc(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under the ROC curve of the map as a detector of region pixels, U / (n_in n_out) (Mann and Whitney 1947).

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1], 0.5 expected for a map without relation to the region; NaN where the region is empty or
        the whole image.

    Example:
        >>> map_auroc(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[False, True, False]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    values, inside = _flat(maps, masks)
    positive = inside.sum(1).double()
    negative = inside.shape[1] - positive
    rank_sum = torch.where(inside, midranks(values), 0).sum(1)
    # U counts the pairs (inside, outside) in the right order; midranks count tied pairs as one half.
    wins = rank_sum - positive * (positive + 1) / 2
    return _nan_unless((positive > 0) & (negative > 0), wins / (positive * negative).clamp(min=1))


def otsu_regions(maps: Tensor) -> Tensor:
    """Pixels above Otsu's threshold, which maximises the variance between the two groups (Otsu 1979).

    The threshold lies between two values of the map itself; no histogram is made.

    Args:
        maps: (B, H, W).

    Returns:
        (B, H, W) bool; all pixels of a constant map.

    Example:
        >>> otsu_regions(torch.tensor([[[0.1, 0.2, 0.9], [0.0, 0.8, 0.1]]])).int()
        tensor([[[0, 0, 1],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    values = maps.double().flatten(1)
    # Scaled to [0, 1], so that squares neither overflow nor underflow.
    low = values.amin(1, keepdim=True)
    values = values - low
    values = values / values.amax(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    ordered = values.sort(1).values
    below = torch.arange(1, ordered.shape[1], dtype=ordered.dtype, device=ordered.device)
    share = below / ordered.shape[1]
    sums = ordered.cumsum(1)[:, :-1] / ordered.shape[1]
    between = (ordered.mean(1, keepdim=True) * share - sums).square() / (share * (1 - share))
    # Equal values are never parted.
    between = torch.where(ordered[:, 1:] > ordered[:, :-1], between, -1)
    best, place = between.max(1, keepdim=True) if between.shape[1] else (ordered.new_full((len(ordered), 1), -1),) * 2
    threshold = torch.where(best >= 0, ordered.gather(1, place.long().clamp(min=0)), -1)
    return (values > threshold).view(maps.shape)


def otsu_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the region and the pixels above Otsu's threshold, see `otsu_regions`.

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1]; the region's share of the image for a constant map, NaN where the region is empty.

    Example:
        >>> maps, masks = torch.tensor([[[0.1, 0.9, 0.8]]]), torch.tensor([[[False, True, False]]])
        >>> otsu_iou(maps, masks)
        tensor([0.5000], dtype=torch.float64)
    """
    _, inside = _flat(maps, masks)
    above = otsu_regions(maps).flatten(1)
    union = (above | inside).sum(1)
    return _nan_unless(inside.any(1), (above & inside).sum(1).double() / union.clamp(min=1))


def topk_localisation(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the region and as many of the highest pixels as the region has.

    Args:
        maps: (B, H, W).
        masks: (B, H, W) bool.

    Returns:
        (B,) float64 in [0, 1]: r / (2 - r) with the share r of `relevance_rank`, which is the expectation over the
        order of tied pixels; NaN where the region is empty.

    Example:
        >>> topk_localisation(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[True, False, True]]]))
        tensor([0.3333], dtype=torch.float64)
    """
    share = relevance_rank(maps, masks)
    return share / (2 - share)
