"""Checks before a run starts: metrics against the data, explanations against the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from labn.errors import InputError, UserError
from labn.metrics.base import SampleMetric


class ConfigurationError(UserError, MisconfigurationException):
    """A callback and the trainer do not fit together; the message says which setting to change."""


def check_scorable(metrics: Mapping[str, SampleMetric], data: Any, split: str) -> None:
    """Stop before a training of hours ends at a metric that its data does not fit.

    Args:
        metrics: name -> metric, as `EvaluationCallback` scores them.
        data: the data module.
        split: that is scored.

    Raises:
        ValueError: patches that images of this size do not have, a protocol that they do not fit, or a metric that
            compares with ground truth where the split has none.
    """
    side = data.image_size
    for name, metric in metrics.items():
        try:
            metric.check_size((side, side))
        except ValueError as error:
            raise InputError(
                f"EvaluationCallback has the metric {name!r}, which does not fit data.init_args.image_size {side}: "
                f"{str(error).rstrip('.')}; change image_size, or metrics, val_metrics and also."
            ) from error
        if metric.needs_regions and not data.has_masks(split):
            raise InputError(
                f"EvaluationCallback has the metric {name!r}, which compares with ground truth, but the {split} split "
                f"of {type(data).__name__} has no masks; leave it out of metrics (val_metrics while fitting), or give "
                "data that has them (ImageFolder: data.init_args.mask_root)."
            )


SHARDED = ("fsdp", "deepspeed", "modelparallel")


def check_strategy(strategy: str) -> None:
    """Refuse a strategy that leaves no rank with the whole network.

    Args:
        strategy: name (`fsdp`, `deepspeed_stage_3`) or class (`ModelParallelStrategy`) of the strategy.

    Raises:
        MisconfigurationException: it shards the parameters.
    """
    if any(word in strategy.lower().replace("_", "") for word in SHARDED):
        raise ConfigurationError(
            f"trainer.strategy is {strategy}, which shards parameters over the ranks, but explanations, scores and "
            "checkpoint hashes need the whole network on each: set trainer.strategy to ddp, or to auto on one device."
        )
