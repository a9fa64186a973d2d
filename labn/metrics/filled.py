"""What metrics share that fill removed pixels and read off one class; and the probability of the bare fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, SampleScores, ScoredBatch
from labn.metrics.functional.class_probability import PROBABILITIES, class_probability
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.fills import FILLS, Channels, FillOptions, fill_with

SCORE_CLASSES: dict[str, Callable[[ScoredBatch, PerturbationEngine], Tensor]] = {
    "label": lambda batch, engine: batch.true_labels,
    "target": lambda batch, engine: batch.targets.to(batch.images.device),
    "predicted": lambda batch, engine: batch.predicted(engine),
}


def key_of(argument: str, value: str, options: Mapping[str, object]) -> str:
    """`value`; ValueError names the argument and what it may be where there is no such option."""
    if value not in options:
        raise InputError(f"{argument} must be one of {sorted(options)}, got {value!r}.")
    return value


def spread(values: Tensor, kept: Tensor, batch: ScoredBatch) -> Tensor:
    """Values (S, ...) of the samples at `kept` as (B, ...) float64, NaN for the others of the batch."""
    full = values.new_full((len(batch.images), *values.shape[1:]), torch.nan, dtype=torch.float64)
    full[kept.to(values.device)] = values.double()
    return full


class FilledMetric(SampleMetric):
    """Base of the metrics that show a model filled images and read one class of its answer.

    Args:
        names: see `SampleMetric`.
        fill: what removed pixels show, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean that the images were normalised with; None: not at all.
        std: likewise the standard deviation.
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: leave out samples with label 0, which then cost no forward; a list of classes scores those.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "label" (the true class), "target" (the explained one) or "predicted".
        probability: "softmax", "sigmoid" or "logit".
        seed: of the "uniform" fill and of random ties.
        chunk_size: inputs per forward, see `PerturbationEngine`; this and the next two shape the engine
            that is made where no `cache` is given.
        fold: whether the BatchNorm-folded copy of the model may be used.
        precision: "fp32" or "bf16".
    """

    def __init__(
        self,
        names: Sequence[str],
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "label",
        probability: str = "softmax",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(names, **kwargs)
        self.fill = key_of("fill", fill, FILLS)
        self.fill_options = FillOptions(mean, std, bias, seed=seed)
        self.score_class = key_of("score_class", score_class, SCORE_CLASSES)
        self.probability = key_of("probability", probability, PROBABILITIES)
        self.positives_only, self.correct_only, self.seed = positives_only, correct_only, seed
        self.engine_options = {"chunk_size": chunk_size, "fold": fold, "precision": precision}

    def included(self, batch: ScoredBatch) -> Tensor:
        """(S,) int64 positions of the batch's samples that are scored."""
        labels = batch.true_labels
        if isinstance(self.positives_only, bool):
            keep = labels > 0 if self.positives_only else torch.ones_like(labels, dtype=torch.bool)
        else:
            keep = torch.isin(labels, torch.tensor(list(self.positives_only), device=labels.device))
        if self.correct_only and bool(keep.any()):
            keep &= labels == batch.predicted(batch.engine(**self.engine_options))
        return keep.nonzero().squeeze(1)

    def classes(self, batch: ScoredBatch, engine: PerturbationEngine) -> Tensor:
        """(B,) the class of each sample whose probability is scored."""
        return SCORE_CLASSES[self.score_class](batch, engine)

    def filling(self, batch: ScoredBatch, name: str | None = None) -> Tensor:
        """The substrate of a batch, broadcastable to its images; `name` instead of the metric's fill."""
        return fill_with(name or self.fill, batch.images, replace(self.fill_options, indices=batch.indices))

    def of_class(self, logits: Tensor, classes: Tensor, probability: str | None = None) -> Tensor:
        """`class_probability` (S, K) of logits (S, K, num_classes), read as the metric does where None is given."""
        return class_probability(logits, classes, probability or self.probability)


class FillProbability(FilledMetric):
    """Probability of the class on the bare fill, p(c | b): where an insertion curve starts.

    On a two-class model it can be anything between 0 and 1, so it belongs beside every insertion-deletion figure.
    """

    higher_is_better = False

    def __init__(
        self,
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "label",
        probability: str = "softmax",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ["fill_probability"], fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed,
            chunk_size, fold, precision, **kwargs,
        )  # fmt: skip

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """One forward per batch where the fill does not depend on the image."""
        kept = self.included(batch)
        values = batch.images.new_empty(0)
        if len(kept):
            engine = batch.engine(**self.engine_options)
            logits = engine.filled(self.filling(batch))[kept, None]
            values = self.of_class(logits, self.classes(batch, engine)[kept])[:, 0]
        return SampleScores({"fill_probability": spread(values, kept, batch)})
