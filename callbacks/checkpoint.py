"""Checkpoints under names that every later command finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keep `best.ckpt` (lowest monitored value) and `last.ckpt` in `<run_dir>/checkpoints/`.

    Args:
        monitor: logged value that decides which epoch is best.
        mode: `min` or `max`.
        kwargs: further arguments of Lightning's `ModelCheckpoint`.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", **kwargs: Any) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            **kwargs,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Place the checkpoints in the run folder, whatever the loggers do."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage=stage)
