"""Metrics of explanations: `torchmetrics.Metric` classes over the functions of `labn.metrics.functional`.

A name is imported when it is first used, because torchmetrics takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labn.metrics.base import SampleMetric, ScoredBatch
    from labn.metrics.confidence import ADCC, AverageDrop, PercentIncrease
    from labn.metrics.descriptions import ValueDescription
    from labn.metrics.errors import ErrorAnalysis
    from labn.metrics.faithfulness import Completeness, Infidelity, MuFidelity, SensitivityN
    from labn.metrics.filled import FillProbability
    from labn.metrics.forecast import ForecastSkill
    from labn.metrics.insertion_deletion import PatchInsertionDeletion
    from labn.metrics.irof import IROF
    from labn.metrics.localisation import (
        MapAUROC,
        MapIoU,
        PointingGame,
        RelevanceMass,
        RelevanceRank,
        TopKLocalisation,
    )
    from labn.metrics.percentage_in import PercentageIn
    from labn.metrics.randomisation import (
        EfficientRandomisation,
        LayerRandomisation,
        Randomisation,
        SmoothRandomisation,
    )
    from labn.metrics.registry import (
        MetricEntry,
        check_settings,
        describe_value,
        metric_by_name,
        register_metric,
        values_named,
    )
    from labn.metrics.road import ROAD
    from labn.metrics.scene import SceneAgreement
    from labn.metrics.scores import SampleScores, Scores, ScoresByMethod
    from labn.metrics.sparseness import Sparseness
    from labn.metrics.stability import RandomLogit, Sensitivity
    from labn.metrics.statistics import Interval, bootstrap_mean, bootstrap_sums, paired_difference

_MODULES = {
    "base": ("SampleMetric", "ScoredBatch"),
    "confidence": ("ADCC", "AverageDrop", "PercentIncrease"),
    "descriptions": ("ValueDescription",),
    "errors": ("ErrorAnalysis",),
    "faithfulness": ("Completeness", "Infidelity", "MuFidelity", "SensitivityN"),
    "filled": ("FillProbability",),
    "forecast": ("ForecastSkill",),
    "insertion_deletion": ("PatchInsertionDeletion",),
    "irof": ("IROF",),
    "localisation": ("MapAUROC", "MapIoU", "PointingGame", "RelevanceMass", "RelevanceRank", "TopKLocalisation"),
    "percentage_in": ("PercentageIn",),
    "randomisation": ("EfficientRandomisation", "LayerRandomisation", "Randomisation", "SmoothRandomisation"),
    "registry": (
        "MetricEntry",
        "check_settings",
        "describe_value",
        "metric_by_name",
        "register_metric",
        "values_named",
    ),
    "road": ("ROAD",),
    "scene": ("SceneAgreement",),
    "scores": ("SampleScores", "Scores", "ScoresByMethod"),
    "sparseness": ("Sparseness",),
    "stability": ("RandomLogit", "Sensitivity"),
    "statistics": ("Interval", "bootstrap_mean", "bootstrap_sums", "paired_difference"),
}

__all__ = [
    "ADCC",
    "IROF",
    "ROAD",
    "AverageDrop",
    "Completeness",
    "EfficientRandomisation",
    "ErrorAnalysis",
    "FillProbability",
    "ForecastSkill",
    "Infidelity",
    "Interval",
    "LayerRandomisation",
    "MapAUROC",
    "MapIoU",
    "MetricEntry",
    "MuFidelity",
    "PatchInsertionDeletion",
    "PercentIncrease",
    "PercentageIn",
    "PointingGame",
    "RandomLogit",
    "Randomisation",
    "RelevanceMass",
    "RelevanceRank",
    "SampleMetric",
    "SampleScores",
    "SceneAgreement",
    "ScoredBatch",
    "Scores",
    "ScoresByMethod",
    "Sensitivity",
    "SensitivityN",
    "SmoothRandomisation",
    "Sparseness",
    "TopKLocalisation",
    "ValueDescription",
    "bootstrap_mean",
    "bootstrap_sums",
    "check_settings",
    "describe_value",
    "metric_by_name",
    "paired_difference",
    "register_metric",
    "values_named",
]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
