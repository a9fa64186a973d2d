"""Average drop and percent increase: what the class's probability does when the image is seen through its map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from labn.fills import Channels
from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, key_of, spread
from labn.metrics.functional.confidence import confidence_drop, confidence_increase
from labn.postprocess import unit_range

# What is multiplied by the map, and so what its zeros show.
MASK_SPACES = {"normalised": "mean", "pixel": "black"}


class ConfidenceChange(FilledMetric):
    """Compare Y, the class's softmax probability on the image x, with O, that on E * x (Chattopadhay et al. 2018).

    E is the map brought to [0, 1] by its own minimum and maximum (a constant map becomes 0 and shows nothing). A map
    that is high nearly everywhere hides little, so that both metrics reward large maps: read them beside `constant`,
    `random` and `sparseness`. Two forwards per image, one of them the unperturbed image that other metrics share.

    Args:
        mask_space: "normalised" multiplies the normalised image, so that zeros of E show the mean colour; "pixel"
            multiplies the pixels in [0, 1], so that they show black.
        mean: per-channel mean that the images were normalised with, for "pixel"; None: not at all.
        std: likewise the standard deviation.
        positives_only: leave out samples with label 0, which then cost no forward.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class; of explained predictions the papers' predicted class), "label" or
            "predicted".
        chunk_size: inputs per forward, see `labn.perturb.PerturbationEngine`; this and the next two shape the engine
            that is made where no `cache` is given.
        fold: whether the BatchNorm-folded copy of the model may be used.
        precision: "fp32" or "bf16".
    """

    name: ClassVar[str]

    def __init__(
        self,
        mask_space: str = "normalised",
        mean: Channels | None = None,
        std: Channels | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        fill = MASK_SPACES[key_of("mask_space", mask_space, MASK_SPACES)]
        super().__init__(
            [self.name],
            fill,
            mean,
            std,
            positives_only=positives_only,
            correct_only=correct_only,
            score_class=score_class,
            chunk_size=chunk_size,
            fold=fold,
            precision=precision,
            **kwargs,
        )

    @abstractmethod
    def compare(self, whole: Tensor, shown: Tensor) -> Tensor:
        """Y (S,) and O (S,), float64 -> the metric's value (S,)."""

    def score_batch(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Values of a batch in percent."""
        kept = self.included(batch)
        values = batch.images.new_empty(0)
        if len(kept):
            engine = batch.engine(**self.engine_options)
            weights = unit_range(batch.maps.to(batch.images)[kept])
            logits = torch.stack([engine.original(kept), engine.soft(weights, self.filling(batch), kept)], 1).double()
            values = self.compare(*self.of_class(logits, self.classes(batch, engine)[kept]).unbind(1))
        return {self.name: spread(values, kept, batch)}


class AverageDrop(ConfidenceChange):
    """Average Drop, 100 max(0, Y - O) / Y per sample; `labn.metrics.functional.confidence_drop`."""

    higher_is_better = False
    name = "average_drop"

    def compare(self, whole: Tensor, shown: Tensor) -> Tensor:
        """`confidence_drop`."""
        return confidence_drop(whole, shown)


class PercentIncrease(ConfidenceChange):
    """Increase in Confidence, 100 where O > Y, per sample; `labn.metrics.functional.confidence_increase`."""

    name = "percent_increase"

    def compare(self, whole: Tensor, shown: Tensor) -> Tensor:
        """`confidence_increase`."""
        return confidence_increase(whole, shown)
