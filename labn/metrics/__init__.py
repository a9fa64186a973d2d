"""Metrics of explanations: `torchmetrics.Metric` classes over the functions of `labn.metrics.functional`."""

from labn.metrics.base import SampleMetric, SampleScores
from labn.metrics.confidence import ADCC, AverageDrop, PercentIncrease
from labn.metrics.errors import ErrorAnalysis
from labn.metrics.filled import FillProbability
from labn.metrics.forecast import ForecastSkill
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.localisation import MapAUROC, PointingGame, RelevanceMass, RelevanceRank
from labn.metrics.percentage_in import PercentageIn
from labn.metrics.randomisation import Randomisation
from labn.metrics.registry import MetricEntry, metric_by_name, register_metric, values_named
from labn.metrics.sparseness import Sparseness
from labn.metrics.statistics import Interval, bootstrap_mean, bootstrap_sums, paired_difference

__all__ = [
    "ADCC",
    "AverageDrop",
    "ErrorAnalysis",
    "FillProbability",
    "ForecastSkill",
    "Interval",
    "MapAUROC",
    "MetricEntry",
    "PatchInsertionDeletion",
    "PercentIncrease",
    "PercentageIn",
    "PointingGame",
    "Randomisation",
    "RelevanceMass",
    "RelevanceRank",
    "SampleMetric",
    "SampleScores",
    "Sparseness",
    "bootstrap_mean",
    "bootstrap_sums",
    "metric_by_name",
    "paired_difference",
    "register_metric",
    "values_named",
]
