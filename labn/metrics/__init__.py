"""Metrics of explanations: `torchmetrics.Metric` classes over the functions of `labn.metrics.functional`."""

from labn.metrics.base import SampleMetric
from labn.metrics.filled import FillProbability
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.localisation import MapAUROC, PointingGame, RelevanceMass, RelevanceRank
from labn.metrics.names import MetricEntry, metric_by_name, register_metric
from labn.metrics.statistics import Interval, bootstrap_mean, paired_difference

__all__ = [
    "FillProbability",
    "Interval",
    "MapAUROC",
    "MetricEntry",
    "PatchInsertionDeletion",
    "PointingGame",
    "RelevanceMass",
    "RelevanceRank",
    "SampleMetric",
    "bootstrap_mean",
    "metric_by_name",
    "paired_difference",
    "register_metric",
]
