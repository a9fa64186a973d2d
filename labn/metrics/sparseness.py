"""Sparseness: how concentrated a map is."""

from __future__ import annotations

from typing import Any

from labn.metrics.base import SampleMetric, SampleScores, ScoredBatch
from labn.metrics.functional.complexity import gini_index


class Sparseness(SampleMetric):
    """Gini index of the map's absolute values, in [0, 1): `labn.metrics.functional.gini_index`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["sparseness"], **kwargs)

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """No forward is needed."""
        return SampleScores({"sparseness": gini_index(batch.maps)})
