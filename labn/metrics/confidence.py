"""Average drop, percent increase and ADCC: what becomes of the class when the image is seen through its map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from labn.metrics.base import SampleScores, ScoredBatch, need_explainer
from labn.metrics.filled import FilledMetric, key_of, spread
from labn.metrics.functional.confidence import adcc, confidence_drop, confidence_increase
from labn.metrics.functional.similarity import correlation
from labn.perturbation.fills import Channels
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
        chunk_size: inputs per forward, see `PerturbationEngine`; this and the next two shape the engine
            that is made where no `cache` is given.
        fold: whether the BatchNorm-folded copy of the model may be used.
        precision: "fp32" or "bf16".
    """

    names_of_values: ClassVar[tuple[str, ...]]

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
            self.names_of_values,
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

    def confidences(self, batch: ScoredBatch, kept: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Y and O, each (S,) float64, of the S samples at `kept` and the weights E (S, H, W)."""
        engine = batch.engine(**self.engine_options)
        logits = torch.stack([engine.original(kept), engine.soft(weights, self.filling(batch), kept)], 1).double()
        whole, shown = self.of_class(logits, self.classes(batch, engine)[kept]).unbind(1)
        return whole, shown

    @abstractmethod
    def values(self, batch: ScoredBatch, kept: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """The metric's values, each (S,) float64, one per name; arguments as for `confidences`."""

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Values of a batch by their names in files."""
        kept = self.included(batch)
        columns: tuple[Tensor, ...] = (batch.images.new_empty(0),) * len(self.names)
        if len(kept):
            # Brought to [0, 1] before it is rounded to the images' dtype, as a small map is 0 in half precision.
            wide = torch.promote_types(batch.maps.dtype, batch.images.dtype)
            maps = unit_range(batch.maps.to(batch.images.device, wide)[kept])
            columns = self.values(batch, kept, maps.to(batch.images))
        return SampleScores({name: spread(column, kept, batch) for name, column in zip(self.names, columns)})


class AverageDrop(ConfidenceChange):
    """Average Drop, 100 max(0, Y - O) / Y per sample; `labn.metrics.functional.confidence_drop`."""

    higher_is_better = False
    names_of_values = ("average_drop",)

    def values(self, batch: ScoredBatch, kept: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """In percent."""
        return (confidence_drop(*self.confidences(batch, kept, weights)),)


class PercentIncrease(ConfidenceChange):
    """Increase in Confidence, 100 where O > Y, per sample; `labn.metrics.functional.confidence_increase`."""

    names_of_values = ("percent_increase",)

    def values(self, batch: ScoredBatch, kept: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """In percent."""
        return (confidence_increase(*self.confidences(batch, kept, weights)),)


class ADCC(ConfidenceChange):
    """Average Drop, Coherency, Complexity (Poppi et al., CVPR Workshops 2021, section 3), per sample and in [0, 1].

    F is what the explainer gives for the image seen through its map, E * x, brought to [0, 1] as E is. Then
    `adcc_coherency` is (1 + r) / 2 with Pearson's correlation r of E and F, `adcc_complexity` the mean of E, and `adcc`
    the harmonic mean of coherency, 1 - complexity and 1 - drop, the drop being `AverageDrop`'s as a share.

    A map that does not depend on the image, such as `random`, is perfectly coherent. Each sample costs one explanation
    beside the two forwards.
    """

    names_of_values = ("adcc", "adcc_coherency", "adcc_complexity")

    def check(self, batch: ScoredBatch) -> None:
        """An explainer is needed."""
        super().check(batch)
        need_explainer(batch, "adcc", "explains the images seen through their maps")

    def values(self, batch: ScoredBatch, kept: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """One explanation of the scored samples."""
        seen = torch.lerp(self.filling(batch), batch.images[kept], weights.unsqueeze(1))
        targets, indices = (values[kept.to(values.device)] for values in (batch.targets, batch.indices))
        maps = batch.explainer(batch.model, seen, targets, indices)
        coherency = (1 + correlation(weights, unit_range(maps.to(weights)))) / 2
        complexity = weights.double().mean((1, 2))
        drop = confidence_drop(*self.confidences(batch, kept, weights)) / 100
        return adcc(coherency, complexity, drop), coherency, complexity
