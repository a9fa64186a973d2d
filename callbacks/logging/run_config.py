"""Save the resolved configuration of every command in the run folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from callbacks.checkpoint import check_monitors, is_last
from labn.io.atomic import write_atomically


class RunConfigCallback(SaveConfigCallback):
    """Write the resolved configuration to `<run_dir>/<subcommand>.yaml`.

    The file describes the run, not the attempt: a fit that resumes from its own last checkpoint does not mention that
    checkpoint.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration, on rank zero."""
        if trainer.is_global_zero and trainer.state.fn and not getattr(trainer, "fast_dev_run", False):
            config, run_dir = self.config.clone(), Path(trainer.default_root_dir)
            config.trainer.default_root_dir = None  # the command line sets it to --run_dir, which may differ next time
            if trainer.state.fn == "fit" and is_last(run_dir, config.get("ckpt_path")):
                config.ckpt_path = None
            text = self.parser.dump(config, skip_none=False)
            write_atomically(run_dir / f"{trainer.state.fn.value}.yaml", text.encode())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the monitors of the schedulers, which exist from here on."""
        check_monitors(trainer)
