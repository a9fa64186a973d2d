"""Compute and keep the maps of every explainer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from callbacks.explanation.base import ExplainingCallback
from callbacks.explanation.session import Batch, Session


class ExplanationCallback(ExplainingCallback):
    """Explain the chosen samples with every explainer and save the maps in `<run_dir>/<stage>/maps/`."""

    def begin(self, trainer: pl.Trainer, session: Session) -> None:
        """Announce the work of this rank."""
        loaders = trainer.test_dataloaders if session.split == "test" else trainer.val_dataloaders
        share = -(-len(session.subset or ()) // trainer.world_size)
        if loaders is not None:
            session.expect(share * len(session.explainers))

    def work(self, trainer: pl.Trainer, session: Session, batch: Batch) -> None:
        """Compute the maps that are not on disk yet."""
        for name in session.explainers:
            session.maps(batch, name)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, session: Session) -> None:
        """Say how many maps earlier runs had left."""
        count = torch.tensor(float(sum(session.from_disk.values())), device=pl_module.device)
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        if total:
            rank_zero_info(f"Took {total} maps from disk ({session.store.folder}).")
