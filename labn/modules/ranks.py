"""Collectives that every rank takes part in, with or without a batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def synchronise_buffers(model: nn.Module | None) -> None:
    """Copy the buffers of rank zero, such as running statistics, to all ranks; a collective.

    Args:
        model: the model of the strategy; only a DDP wrapper that synchronises buffers is changed.
    """
    # DDP synchronises buffers in the first forward pass after a training step, which a rank without a validation batch
    # never runs. Done here, where all ranks take part, that forward pass needs no collective.
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        for buffer in model.module.buffers():
            dense = buffer.detach().contiguous()  # collectives do not accept channels_last
            dist.broadcast(dense, src=0, group=model.process_group)
            buffer.copy_(dense)
        model.require_forward_param_sync = False
