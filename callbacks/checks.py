"""Checks before a run starts: whether metrics fit the data, and whether the strategy allows explanations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from labn.errors import InputError, UserError
from labn.metrics.base import SampleMetric


class ConfigurationError(UserError, MisconfigurationException):
    """A callback and a setting of the trainer contradict each other; the message names the setting to change."""


def check_scorable(metrics: Mapping[str, SampleMetric], data: Any, split: str) -> None:
    """Raise, before training starts, if a metric cannot score the images of the data.

    Args:
        metrics: name -> metric, as `EvaluationCallback` scores them.
        data: the data module.
        split: the split that is scored.

    Raises:
        InputError: the image size does not allow the metric's patches or protocol, or the metric needs ground-truth
            masks or scenes and the split has none.
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
                f"of {type(data).__name__} has no masks; remove it from metrics (val_metrics while fitting), or use "
                "data with masks (ImageFolder: data.init_args.mask_root)."
            )
        if metric.needs_scenes and not data.has_scenes(split):
            raise InputError(
                f"EvaluationCallback has the metric {name!r}, which draws images without their objects, but the "
                f"{split} split of {type(data).__name__} was not drawn from objects; remove it from metrics "
                "(val_metrics while fitting), or use datamodules.SyntheticFundus or SyntheticRelations."
            )


# Substrings of the names and class names of Lightning's strategies that shard parameters, lower case, without "_".
SHARDED = ("fsdp", "deepspeed", "modelparallel")


def check_strategy(strategy: str) -> None:
    """Raise if a strategy shards the parameters, so that no rank has the whole network.

    Args:
        strategy: name (`fsdp`, `deepspeed_stage_3`) or class name (`ModelParallelStrategy`) of the strategy.

    Raises:
        ConfigurationError: the strategy shards the parameters.
    """
    if any(word in strategy.lower().replace("_", "") for word in SHARDED):
        raise ConfigurationError(
            f"trainer.strategy is {strategy}, which shards parameters over the ranks, but explanations, scores and "
            "checkpoint hashes need the whole network on each: set trainer.strategy to ddp, or to auto on one device."
        )
