"""The second device of `elsewhere` for a Trainer; WORDS choose it on the command line."""

from __future__ import annotations

from typing import Any

import torch
from elsewhere import DEVICE
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

NAME = "elsewhere"
WORDS = [f"--trainer.accelerator={NAME}", f"--trainer.strategy={NAME}"]


class ElsewhereAccelerator(CPUAccelerator):
    """The CPU under another name."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""


class ElsewhereStrategy(SingleDeviceStrategy):
    """Model and batches are on the second device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(device=DEVICE, **options)


if NAME not in AcceleratorRegistry:
    AcceleratorRegistry.register(NAME, ElsewhereAccelerator, description="for tests")
    StrategyRegistry.register(NAME, ElsewhereStrategy, description="for tests")
