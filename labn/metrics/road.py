"""ROAD: removed pixels filled in from their neighbours, most and least relevant first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, scatter_to_batch
from labn.metrics.scores import SampleScores
from labn.perturbation.imputation import linear_imputation
from labn.perturbation.patches import patch_ranks
from labn.perturbation.stateless_random import sample_normal

ROAD_STREAM = 5  # of the random numbers; ties, fills, sets of patches and noise have others


class ROAD(FilledMetric):
    """ROAD: (p without the least relevant pixels - p without the most relevant ones) / 2 (Rong et al., ICML 2022).

    Removed pixels become weighted means of their neighbours, with a little noise, so that the shape of the removed
    region tells the network little: see `labn.perturbation.imputation.linear_imputation`. The value is the mean over
    the removed fractions, in [-0.5, 0.5], and 0 is expected of an uninformative map. Tied pixels come in a random
    order. The cost is two forwards per fraction and map.

    Args:
        fractions: removed shares of the pixels, in (0, 1).
        noise: standard deviation of the noise on filled pixels, in the images' normalised units.
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class), "label" or "predicted".
        probability: "softmax", "sigmoid" or "logit".
        seed: seed of ties and noise, which depend on (seed, sample index).
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: a fraction that is not between 0 and 1, or a negative noise.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> _ = nn.init.zeros_(model[1].weight)
        >>> images, maps, target = torch.rand(1, 1, 4, 4), torch.rand(1, 4, 4), torch.tensor([0])
        >>> ROAD().score(model, images, maps, target, torch.tensor([0]))
        {'road': tensor([0.], dtype=torch.float64)}
    """

    def __init__(
        self,
        fractions: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        noise: float = 0.01,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        probability: str = "softmax",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ["road"],
            positives_only=positives_only,
            correct_only=correct_only,
            score_class=score_class,
            probability=probability,
            seed=seed,
            chunk_size=chunk_size,
            fold=fold,
            precision=precision,
            **kwargs,
        )
        if not fractions or not all(0 < share < 1 for share in fractions) or noise < 0:
            raise InputError(
                f"fractions must be between 0 and 1 and noise not negative, got {list(fractions)} and {noise}."
            )
        self.fractions, self.noise = tuple(fractions), noise

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch."""
        scored = self.included(batch)
        values = batch.images.new_empty(0)
        if len(scored):
            engine = batch.engine(**self.engine_options)
            images, known = batch.images[scored], self._known(batch, scored)
            noise = self._noise(batch, scored)
            steps = known.shape[1]

            def filled(position: Tensor) -> Tensor:
                row, step = position // steps, position % steps
                kept = known[row, step]
                return linear_imputation(images[row], kept) + noise[row] * ~kept.unsqueeze(1)

            logits = engine.run(filled, len(scored) * steps).unflatten(0, (len(scored), steps)).double()
            least, most = self.of_class(logits, self.classes(batch, engine)[scored]).chunk(2, dim=1)
            values = (least - most).mean(1) / 2
        return SampleScores({"road": scatter_to_batch(values, scored, batch)})

    def _known(self, batch: ScoredBatch, scored: Tensor) -> Tensor:
        """Known pixels (S, 2 K, H, W) bool: without the least relevant K shares, then without the most relevant."""
        maps = batch.maps.to(batch.images.device)[scored]
        ranks = patch_ranks(maps, "random", seed=self.seed, indices=batch.indices.to(maps.device)[scored])
        pixels = ranks.shape[1]
        counts = torch.tensor([min(max(1, round(f * pixels)), pixels - 1) for f in self.fractions], device=maps.device)
        known = torch.cat([ranks[:, None] < pixels - counts[:, None], ranks[:, None] >= counts[:, None]], 1)
        return known.unflatten(2, (maps.shape[-2], maps.shape[-1]))

    def _noise(self, batch: ScoredBatch, scored: Tensor) -> Tensor:
        """Normal noise (S, C, H, W), the same for every fraction."""
        count = batch.images[0].numel()
        indices = batch.indices.to(batch.images.device)[scored]
        normal = sample_normal(self.seed, indices, count, torch.float64, ROAD_STREAM)
        return (self.noise * normal).to(batch.images).view(len(scored), *batch.images.shape[1:])
