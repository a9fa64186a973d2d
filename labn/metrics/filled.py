"""Base of the metrics that score one class on filled images, and the probability of the class on the bare fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.functional.class_probability import PROBABILITIES, class_probability
from labn.metrics.scores import SampleScores
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.fills import FILLS, Channels, FillOptions, fill_with

SCORE_CLASSES: dict[str, Callable[[ScoredBatch, PerturbationEngine], Tensor]] = {
    "label": lambda batch, engine: batch.true_labels,
    "target": lambda batch, engine: batch.targets.to(batch.images.device),
    "predicted": lambda batch, engine: batch.predicted(engine),
}


def checked_option(argument: str, value: str, options: Mapping[str, object]) -> str:
    """Return `value` if it is a key of `options`, else raise InputError with the name of the argument."""
    if value not in options:
        raise InputError(f"{argument} must be one of {sorted(options)}, got {value!r}.")
    return value


def scatter_to_batch(values: Tensor, scored: Tensor, batch: ScoredBatch) -> Tensor:
    """Scatter values (S, ...) of the samples at the positions `scored` to (B, ...) float64; NaN for all others."""
    full = values.new_full((len(batch.images), *values.shape[1:]), torch.nan, dtype=torch.float64)
    full[scored.to(values.device)] = values.double()
    return full


class FilledMetric(SampleMetric):
    """Base of the metrics that run the model on filled images and score one class of its output.

    Args:
        names: names of the values.
        fill: colour of removed pixels, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: True leaves out samples with label 0, without a forward; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "label" (the true class), "target" (the explained one) or "predicted".
        probability: "softmax", "sigmoid" or "logit".
        seed: seed of the "uniform" fill and of random ties.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
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
        self.fill = checked_option("fill", fill, FILLS)
        self.fill_options = FillOptions(mean, std, bias, seed=seed)
        self.score_class = checked_option("score_class", score_class, SCORE_CLASSES)
        self.probability = checked_option("probability", probability, PROBABILITIES)
        self.positives_only, self.correct_only, self.seed = positives_only, correct_only, seed
        self.engine_options = {"chunk_size": chunk_size, "fold": fold, "precision": precision}

    def included(self, batch: ScoredBatch) -> Tensor:
        """Positions (S,) int64 of the scored samples in the batch."""
        labels = batch.true_labels
        if isinstance(self.positives_only, bool):
            keep = labels > 0 if self.positives_only else torch.ones_like(labels, dtype=torch.bool)
        else:
            keep = torch.isin(labels, torch.tensor(list(self.positives_only), device=labels.device))
        # The predictions need a forward of the whole batch, which a batch without candidates does without.
        if self.correct_only and bool(keep.any()):
            keep &= labels == batch.predicted(batch.engine(**self.engine_options))
        return keep.nonzero().squeeze(1)

    def classes(self, batch: ScoredBatch, engine: PerturbationEngine) -> Tensor:
        """Scored class (B,) of each sample."""
        return SCORE_CLASSES[self.score_class](batch, engine)

    def filling(self, batch: ScoredBatch, name: str | None = None) -> Tensor:
        """Fill of a batch, broadcastable to its images.

        Args:
            batch: the batch.
            name: a name in `FILLS`; None: the metric's own.
        """
        # Random fills are drawn by the sample's index, so that they do not depend on the batch.
        return fill_with(name or self.fill, batch.images, replace(self.fill_options, indices=batch.indices))

    def of_class(self, logits: Tensor, classes: Tensor, probability: str | None = None) -> Tensor:
        """`class_probability` (S, K) of logits (S, K, num_classes); None: the metric's own `probability`."""
        return class_probability(logits, classes, probability or self.probability)


class FillProbability(FilledMetric):
    """Probability p(c | b) of the class on the bare fill b, the start of an insertion curve.

    On a two-class model it can have any value from 0 to 1, so that insertion and deletion are read beside it. The
    arguments are those of `FilledMetric`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.ones(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> FillProbability(fill="black").score(model, images, maps, target, index)
        {'fill_probability': tensor([0.5000], dtype=torch.float64)}
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
        """Score a batch; a fill that does not depend on the image costs one forward per batch."""
        scored = self.included(batch)
        values = batch.images.new_empty(0)
        if len(scored):
            engine = batch.engine(**self.engine_options)
            logits = engine.filled(self.filling(batch))[scored, None]
            values = self.of_class(logits, self.classes(batch, engine)[scored])[:, 0]
        return SampleScores({"fill_probability": scatter_to_batch(values, scored, batch)})
