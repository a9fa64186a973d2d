"""Which strategies of Lightning explanations can run under."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException

SHARDED = ("fsdp", "deepspeed", "modelparallel")


def refuse_sharded(strategy: str) -> None:
    """Refuse a strategy that leaves no rank with the whole network.

    Args:
        strategy: name (`fsdp`, `deepspeed_stage_3`) or class (`ModelParallelStrategy`) of the strategy.

    Raises:
        MisconfigurationException: it shards the parameters.
    """
    if any(word in strategy.lower().replace("_", "") for word in SHARDED):
        raise MisconfigurationException(
            f"trainer.strategy is {strategy}, which shards parameters over the ranks, but explanations, scores and "
            "checkpoint hashes need the whole network on each: set trainer.strategy to ddp, or to auto on one device."
        )
