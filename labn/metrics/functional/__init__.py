"""The mathematics of the metrics as plain functions of tensors."""

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

__all__ = [
    "InsertionDeletionCurves",
    "boxes_to_masks",
    "kept_fractions",
    "map_auroc",
    "nominal_fractions",
    "official_counts",
    "paper_counts",
    "pointing_game",
    "relevance_mass",
    "relevance_rank",
    "trapezoid_area",
]
