"""Compute and save the maps of every explainer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from callbacks.explanation.base import ExplainingCallback
from callbacks.explanation.session import ExplainedBatch


class ExplanationCallback(ExplainingCallback):
    """Explain the chosen samples with every explainer and save the maps in `<run_dir>/<stage>/maps/`."""

    def work_on(self, trainer: pl.Trainer, batch: ExplainedBatch) -> None:
        """Compute the maps that are not on disk yet."""
        for name in self.session.explainers:
            self.session.maps(batch, name)

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the number of maps that were read from disk; a collective."""
        count = torch.tensor(float(sum(self.session.from_disk.values())), device=pl_module.device)
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        if total:
            rank_zero_info(f"Read {total} maps from disk ({self.folder}).")
