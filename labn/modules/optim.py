"""Parameter groups of the optimisers, and the schedules of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from labn.errors import InputError


def parameter_groups(network: nn.Module, fast: Iterable[nn.Module], lr: float, fast_lr: float) -> list[dict[str, Any]]:
    """Divide the trainable parameters of `network` into two groups with different learning rates.

    Args:
        network: the network.
        fast: submodules with learning rate `fast_lr` (JSAI 2022, table 1: attention branch and last linear layer).
        lr: learning rate of all other parameters.
        fast_lr: learning rate of `fast`.

    Returns:
        Groups for an optimiser, named `base` and `fast`, without empty ones.

    Raises:
        InputError: no parameter is trainable, or a module of `fast` is not in the network.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> [(group["name"], group["lr"]) for group in parameter_groups(network, [network[1]], 1e-4, 1e-3)]
        [('base', 0.0001), ('fast', 0.001)]
    """
    own = {id(p) for p in network.parameters()}
    fast_ids = {id(p) for module in fast for p in module.parameters()}
    if not fast_ids <= own:
        raise InputError("A module of the fast group is not a submodule of the network; pass submodules only.")
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
    """Lightning's dictionary of an optimiser with `ReduceLROnPlateau(mode="min")` on the validation loss.

    `patience` counts validations: `CheckedModule.on_train_start` makes the schedule step once per validation.
    """
    scheduler = ReduceLROnPlateau(optimizer, mode="min", factor=factor, patience=patience, min_lr=min_lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


def on_cosine(optimizer: Optimizer, epochs: int, min_lr: float) -> OptimizerLRSchedulerConfig:
    """Optimiser dictionary of Lightning with a cosine schedule from each group's rate to `min_lr` after `epochs`."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, epochs, eta_min=min_lr)}}
