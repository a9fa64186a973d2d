"""What every rank must do although it may have no batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def synchronise_buffers(model: nn.Module | None) -> None:
    """Give every rank the buffers of rank zero, such as running statistics; a collective.

    The DDP wrapper does so in its first forward after a training step, which a rank without a validation batch never
    reaches. Done here, where every rank comes by, it leaves that forward without a collective.

    Args:
        model: what the strategy runs; nothing is done unless DDP wraps it and would synchronise.
    """
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        for buffer in model.module.buffers():
            dense = buffer.detach().contiguous()  # a collective takes no other memory format
            dist.broadcast(dense, src=0, group=model.process_group)
            buffer.copy_(dense)
        model.require_forward_param_sync = False
