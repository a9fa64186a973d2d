"""Localisation metrics: the map against ground-truth masks or boxes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, SampleScores, ScoredBatch
from labn.metrics.functional.localisation import (
    boxes_to_masks,
    map_auroc,
    pointing_game,
    relevance_mass,
    relevance_rank,
)


def need_regions(batch: ScoredBatch, name: str) -> None:
    """Raise ValueError naming the metric `name` where a batch has neither masks nor boxes."""
    if batch.masks is None and batch.boxes is None:
        raise InputError(f"metric {name!r} compares with ground truth: it needs masks= or boxes=.")


def regions_of(batch: ScoredBatch) -> Tensor:
    """Ground truth (B, H, W) bool of a batch: its masks, else the union of each sample's boxes."""
    if batch.masks is not None:
        return batch.masks
    assert batch.boxes is not None
    return boxes_to_masks(batch.boxes, (batch.maps.shape[-2], batch.maps.shape[-1]))


class LocalisationMetric(SampleMetric):
    """A function of map and region per sample; a sample whose region is empty is left out.

    Subclasses call the functional twin, which states the equation. Masks win over boxes where both are given.
    """

    name: ClassVar[str]
    needs_regions = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([self.name], **kwargs)

    @abstractmethod
    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """(B, H, W), (B, H, W) bool -> (B,) float64."""

    def check(self, batch: ScoredBatch) -> None:
        """Ground truth is needed."""
        super().check(batch)
        need_regions(batch, self.name)

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Values of a batch."""
        return SampleScores({self.name: self.compare(batch.maps, regions_of(batch).to(batch.maps.device))})


class RelevanceMass(LocalisationMetric):
    """Share of the positive relevance that lies inside the region: `labn.metrics.functional.relevance_mass`."""

    name = "mass"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`relevance_mass`."""
        return relevance_mass(maps, masks)


class PointingGame(LocalisationMetric):
    """Whether the map's maximum lies inside the region: `labn.metrics.functional.pointing_game`."""

    name = "pointing"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`pointing_game`."""
        return pointing_game(maps, masks)


class RelevanceRank(LocalisationMetric):
    """Share of the region's size in top pixels that lies inside: `labn.metrics.functional.relevance_rank`."""

    name = "rank"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`relevance_rank`."""
        return relevance_rank(maps, masks)


class MapAUROC(LocalisationMetric):
    """The map as a detector of the region's pixels: `labn.metrics.functional.map_auroc`."""

    name = "auroc"

    def compare(self, maps: Tensor, masks: Tensor) -> Tensor:
        """`map_auroc`."""
        return map_auroc(maps, masks)
