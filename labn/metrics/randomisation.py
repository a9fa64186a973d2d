"""Model-parameter randomisation test: similarity of a map to the map of the model with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.inference.hooks import recording_calls
from labn.inference.randomised_copy import randomised_copies
from labn.metrics.base import SampleMetric, ScoredBatch, check_explainer
from labn.metrics.functional.similarity import rank_correlation
from labn.metrics.scores import SampleScores


class Randomisation(SampleMetric):
    """Similarity of the map to the map of a model with random weights, by the same explainer (Adebayo et al. 2018).

    The similarity is Spearman's rank correlation of the pixels, in [-1, 1]. At 1 the explanation does not depend on
    the weights; the explainers `random` and `constant` have exactly 1. Copies of the model are randomised and the model
    itself does not change. The cost is one explanation per sample and stage.

    Args:
        n_stages: 1 randomises all layers at once. A larger number randomises the layers cumulatively from the output to
            the input in that many groups, and the value is the mean over the groups (the paper's cascade).
        absolute: whether absolute values are compared, for methods whose sign carries no meaning.
        seed: seed of the random weights.

    Raises:
        InputError: `n_stages` below 1, or a model whose copy would run modules of the model itself.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("random"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> Randomisation().score(model, images, maps, target, index, explainer=explainer)
        {'randomisation': tensor([1.], dtype=torch.float64)}
    """

    higher_is_better = False

    def __init__(self, n_stages: int = 1, absolute: bool = False, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["randomisation"], **kwargs)
        if n_stages < 1:
            raise InputError(f"n_stages must be at least 1, got {n_stages}.")
        self.n_stages, self.absolute, self.seed = n_stages, absolute, seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "randomisation", "explains a randomised copy of the model")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with one explanation per stage."""
        values = []
        for network in randomised_copies(batch.model, self.seed, self.n_stages):
            # A deep copy does not reach modules that a closure holds; their calls show up on the original model.
            with recording_calls(batch.model) as original_calls:
                maps = batch.explain_again(batch.images, batch.targets, network)
            if original_calls:
                raise InputError(
                    f"randomisation: a copy of {type(batch.model).__name__} runs the model's own "
                    f"{type(original_calls[0]).__name__}, because an attribute of it is a function that holds it; "
                    "make that function a method."
                )
            # Ranks and not values: explainers differ in scale, and Adebayo et al. report Spearman's correlation.
            values.append(rank_correlation(self._compared(batch.maps.to(maps)), self._compared(maps)))
        return SampleScores({"randomisation": torch.stack(values).mean(0)})

    def _compared(self, maps: Tensor) -> Tensor:
        return maps.abs() if self.absolute else maps
