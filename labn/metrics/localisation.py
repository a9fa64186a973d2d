"""Localisation metrics: the map against ground-truth masks or boxes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.functional.localisation import (
    boxes_to_masks,
    map_auroc,
    otsu_iou,
    pointing_game,
    relevance_mass,
    relevance_rank,
    topk_localisation,
)
from labn.metrics.scores import SampleScores


def check_regions(batch: ScoredBatch, name: str) -> None:
    """Raise InputError with the metric's name where a batch has neither masks nor boxes."""
    if batch.masks is None and batch.boxes is None:
        raise InputError(f"metric {name!r} compares with ground truth: it needs masks= or boxes=.")


def regions_of(batch: ScoredBatch) -> Tensor:
    """Ground-truth regions (B, H, W) bool of a batch: the masks, or else the union of each sample's boxes."""
    if batch.masks is not None:
        return batch.masks
    assert batch.boxes is not None  # `check_regions` has raised otherwise
    return boxes_to_masks(batch.boxes, (batch.maps.shape[-2], batch.maps.shape[-1]))


class LocalisationMetric(SampleMetric):
    """Base of the metrics that compare a map with a region; samples with an empty region are left out.

    Subclasses call the function of `labn.metrics.functional` that states the equation. Masks take precedence over boxes
    where both are given.
    """

    name: ClassVar[str]
    needs_regions = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([self.name], **kwargs)

    @abstractmethod
    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Score maps (B, H, W) against masks (B, H, W) bool: (B,) float64."""

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without masks or boxes."""
        super().check(batch)
        check_regions(batch, self.name)

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch; the model is not run."""
        return SampleScores({self.name: self.compare(batch.maps, regions_of(batch).to(batch.maps.device))})


class RelevanceMass(LocalisationMetric):
    """Share of the positive relevance inside the region: see `labn.metrics.functional.relevance_mass`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, masks = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[False, True], [True, False]]])
        >>> images, target, index = torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> RelevanceMass().score(nn.Identity(), images, maps, target, index, masks=masks)
        {'mass': tensor([0.5000], dtype=torch.float64)}
    """

    name = "mass"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`relevance_mass`."""
        return relevance_mass(maps, masks)


class PointingGame(LocalisationMetric):
    """Pointing game, 1 where the map's maximum lies in the region: see `labn.metrics.functional.pointing_game`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, masks = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[False, True], [True, False]]])
        >>> images, target, index = torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> PointingGame().score(nn.Identity(), images, maps, target, index, masks=masks)
        {'pointing': tensor([0.], dtype=torch.float64)}
    """

    name = "pointing"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`pointing_game`."""
        return pointing_game(maps, masks)


class RelevanceRank(LocalisationMetric):
    """Share of the |region| highest pixels inside the region: see `labn.metrics.functional.relevance_rank`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, masks = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[False, True], [True, False]]])
        >>> images, target, index = torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> RelevanceRank().score(nn.Identity(), images, maps, target, index, masks=masks)
        {'rank': tensor([0.5000], dtype=torch.float64)}
    """

    name = "rank"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`relevance_rank`."""
        return relevance_rank(maps, masks)


class MapAUROC(LocalisationMetric):
    """Area under the ROC curve of the map as a detector of region pixels: see `labn.metrics.functional.map_auroc`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, masks = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[False, True], [True, False]]])
        >>> images, target, index = torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> MapAUROC().score(nn.Identity(), images, maps, target, index, masks=masks)
        {'auroc': tensor([0.5000], dtype=torch.float64)}
    """

    name = "auroc"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`map_auroc`."""
        return map_auroc(maps, masks)


class MapIoU(LocalisationMetric):
    """Intersection over union of region and thresholded map: see `labn.metrics.functional.otsu_iou`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, masks = torch.tensor([[[3.0, 2.9], [1.0, 0.0]]]), torch.tensor([[[False, True], [True, False]]])
        >>> images, target, index = torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> MapIoU().score(nn.Identity(), images, maps, target, index, masks=masks)
        {'iou': tensor([0.3333], dtype=torch.float64)}
    """

    name = "iou"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`otsu_iou`."""
        return otsu_iou(maps, masks)


class TopKLocalisation(LocalisationMetric):
    """Intersection over union of region and highest pixels: see `labn.metrics.functional.topk_localisation`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, masks = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[False, True], [True, False]]])
        >>> images, target, index = torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> TopKLocalisation().score(nn.Identity(), images, maps, target, index, masks=masks)
        {'topk_localisation': tensor([0.3333], dtype=torch.float64)}
    """

    name = "topk_localisation"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`topk_localisation`."""
        return topk_localisation(maps, masks)
