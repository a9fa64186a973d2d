"""Metrics: `torchmetrics.Metric` classes over functional twins."""
