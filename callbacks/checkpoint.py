"""Checkpoints under names that every later command finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from labn.preprocessing import KEY


class RunCheckpoint(ModelCheckpoint):
    """Base of `BestCheckpoint` and `LastCheckpoint`: one file of a fixed name in `<run_dir>/checkpoints/`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Place the checkpoint in the run folder, whatever the loggers do."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage=stage)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what pictures the network expects, so that the file can be used alone."""
        preprocessing = getattr(getattr(trainer, "datamodule", None), "preprocessing", None)
        if preprocessing is not None:
            checkpoint[KEY] = preprocessing().plain()


class BestCheckpoint(RunCheckpoint):
    """Keep `best.ckpt`, the epoch with the best monitored value.

    Args:
        monitor: logged value that decides.
        mode: `min` or `max`.
        kwargs: further arguments of Lightning's `ModelCheckpoint`.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", **kwargs: Any) -> None:
        super().__init__(filename="best", monitor=monitor, mode=mode, enable_version_counter=False, **kwargs)


class LastCheckpoint(RunCheckpoint):
    """Keep `last.ckpt`, every epoch, better or not.

    Lightning's own `save_last` writes only in epochs that were saved for another reason, such as being the best, so
    that a killed run would fall back to its best epoch.
    List this callback after `BestCheckpoint`, whose state it saves.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)
