"""Optimiser groups and the plateau schedule of the papers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from labn.errors import InputError


def parameter_groups(network: nn.Module, fast: Iterable[nn.Module], lr: float, fast_lr: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of `network` into two groups, each parameter in exactly one.

    Args:
        network: the whole network.
        fast: its submodules that learn with `fast_lr` (JSAI 2022, table 1: the attention branch and the final linear).
        lr: learning rate of everything else.
        fast_lr: learning rate of `fast`.

    Returns:
        Groups for an optimiser, named `base` and `fast`, empty ones left out.

    Raises:
        ValueError: nothing is trainable, or a fast module is not part of the network.
    """
    own = {id(p) for p in network.parameters()}
    fast_ids = {id(p) for module in fast for p in module.parameters()}
    if not fast_ids <= own:
        raise InputError("A module of the fast group is not part of the network.")
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"name": "base", "params": [p for p in trainable if id(p) not in fast_ids], "lr": lr},
        {"name": "fast", "params": [p for p in trainable if id(p) in fast_ids], "lr": fast_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("The network has no trainable parameter; unfreeze some.")
    return groups


def on_plateau(optimizer: Optimizer, factor: float, patience: int, min_lr: float) -> OptimizerLRSchedulerConfig:
    """Lightning's optimiser dictionary with `ReduceLROnPlateau(mode="min")` on the validation loss.

    `patience` counts validations: `CheckedModule` sets how many epochs there are to each.
    """
    scheduler = ReduceLROnPlateau(optimizer, mode="min", factor=factor, patience=patience, min_lr=min_lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
