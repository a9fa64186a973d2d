"""Model-parameter randomisation: does an explanation change when the model no longer knows anything?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.inference.hooks import recording_calls
from labn.inference.randomised_copy import randomised_copies
from labn.metrics.base import SampleMetric, SampleScores, ScoredBatch, need_explainer
from labn.metrics.functional.similarity import rank_correlation


class Randomisation(SampleMetric):
    """Similarity of the map to the one that the same explainer makes of a randomised copy (Adebayo et al. 2018).

    The similarity is Spearman's rank correlation of the pixels, in [-1, 1]; 1 says that the explanation has nothing to
    do with the model's weights (the rows `random` and `constant` have exactly 1). The model is never changed.

    Each stage costs one explanation per sample.

    Args:
        n_stages: 1 randomises all layers at once; more randomise them cumulatively from the output to the input, in
            that many groups, and the value is the mean over the stages (the cascade of the paper).
        absolute: compare absolute values, for methods whose sign carries no meaning.
        seed: of the random weights.

    Raises:
        ValueError: no stage.
    """

    higher_is_better = False

    def __init__(self, n_stages: int = 1, absolute: bool = False, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["randomisation"], **kwargs)
        if n_stages < 1:
            raise InputError(f"n_stages must be at least 1, got {n_stages}.")
        self.n_stages, self.absolute, self.seed = n_stages, absolute, seed

    def check(self, batch: ScoredBatch) -> None:
        """An explainer is needed."""
        super().check(batch)
        need_explainer(batch, "randomisation", "explains a randomised copy of the model")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Values of a batch: one explanation per stage."""
        values = []
        for network in randomised_copies(batch.model, self.seed, self.n_stages):
            with recording_calls(batch.model) as heard:
                maps = batch.explainer(network, batch.images, batch.targets, batch.indices)
            if heard:
                raise InputError(
                    f"randomisation: a copy of {type(batch.model).__name__} runs the model's own "
                    f"{type(heard[0]).__name__}, as an attribute of it is a function that holds it; make that a method."
                )
            values.append(rank_correlation(self._compared(batch.maps.to(maps)), self._compared(maps)))
        return SampleScores({"randomisation": torch.stack(values).mean(0)})

    def _compared(self, maps: Tensor) -> Tensor:
        return maps.abs() if self.absolute else maps
