"""Sparseness: concentration of a map on few pixels."""

from __future__ import annotations

from typing import Any

from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.functional.complexity import gini_index
from labn.metrics.scores import SampleScores


class Sparseness(SampleMetric):
    """Gini index of the map's absolute values, in [0, 1): see `labn.metrics.functional.gini_index`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> maps, images = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 1, 2, 2)
        >>> Sparseness().score(nn.Identity(), images, maps, torch.tensor([0]), torch.tensor([0]))
        {'sparseness': tensor([0.7500], dtype=torch.float64)}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["sparseness"], **kwargs)

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch; the model is not run."""
        return SampleScores({"sparseness": gini_index(batch.maps)})
