"""The metrics as functions of tensors, without state; the classes of `labn.metrics` call them."""

from labn.metrics.functional.class_probability import class_probability
from labn.metrics.functional.complexity import gini_index, histogram_entropy, relative_rise
from labn.metrics.functional.confidence import adcc, confidence_drop, confidence_increase, percent_counts
from labn.metrics.functional.errors import (
    KINDS,
    ErrorThresholds,
    count_errors,
    kinds_of_error,
    region_shares,
)
from labn.metrics.functional.faithfulness import completeness_gap, scaled_infidelity, subset_correlation
from labn.metrics.functional.insertion_deletion import (
    InsertionDeletionCurves,
    insertion_deletion_curves,
    kept_fractions,
    mean_height,
    nominal_fractions,
    official_counts,
    paper_counts,
    patch_counts,
    patch_insertion_deletion,
    trapezoid_area,
)
from labn.metrics.functional.localisation import (
    boxes_to_masks,
    map_auroc,
    otsu_iou,
    otsu_regions,
    pointing_game,
    relevance_mass,
    relevance_rank,
    topk_localisation,
)
from labn.metrics.functional.scene import (
    object_importances,
    object_opinions,
    painted_importances,
    scene_agreement,
)
from labn.metrics.functional.similarity import correlation, midranks, rank_correlation
from labn.metrics.functional.stability import relative_changes
from labn.metrics.functional.superpixels import area_over_curve, segment_means, segment_ranks
from labn.perturbation.coalitions import removal_design, shapley_design

__all__ = [
    "KINDS",
    "ErrorThresholds",
    "InsertionDeletionCurves",
    "adcc",
    "area_over_curve",
    "boxes_to_masks",
    "class_probability",
    "completeness_gap",
    "confidence_drop",
    "confidence_increase",
    "correlation",
    "count_errors",
    "gini_index",
    "histogram_entropy",
    "insertion_deletion_curves",
    "kept_fractions",
    "kinds_of_error",
    "map_auroc",
    "mean_height",
    "midranks",
    "nominal_fractions",
    "object_importances",
    "object_opinions",
    "official_counts",
    "otsu_iou",
    "otsu_regions",
    "painted_importances",
    "paper_counts",
    "patch_counts",
    "patch_insertion_deletion",
    "percent_counts",
    "pointing_game",
    "rank_correlation",
    "region_shares",
    "relative_changes",
    "relative_rise",
    "relevance_mass",
    "relevance_rank",
    "removal_design",
    "scaled_infidelity",
    "scene_agreement",
    "segment_means",
    "segment_ranks",
    "shapley_design",
    "subset_correlation",
    "topk_localisation",
    "trapezoid_area",
]
