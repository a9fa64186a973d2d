"""The mathematics of the metrics as plain functions of tensors."""

from labn.metrics.functional.complexity import gini_index
from labn.metrics.functional.confidence import confidence_drop, confidence_increase, percent_counts
from labn.metrics.functional.insertion_deletion import (
    InsertionDeletionCurves,
    kept_fractions,
    nominal_fractions,
    official_counts,
    paper_counts,
    trapezoid_area,
)
from labn.metrics.functional.localisation import (
    boxes_to_masks,
    map_auroc,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from labn.metrics.functional.similarity import midranks, rank_correlation

__all__ = [
    "InsertionDeletionCurves",
    "boxes_to_masks",
    "confidence_drop",
    "confidence_increase",
    "gini_index",
    "kept_fractions",
    "map_auroc",
    "midranks",
    "nominal_fractions",
    "official_counts",
    "paper_counts",
    "percent_counts",
    "pointing_game",
    "rank_correlation",
    "relevance_mass",
    "relevance_rank",
    "trapezoid_area",
]
