"""The resolved configuration of every command in the run folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from callbacks.checkpoint import check_monitors, is_last
from labn.io.atomic import write_atomically


class RunConfigCallback(SaveConfigCallback):
    """Write the resolved configuration to `<run_dir>/<subcommand>.yaml`, whatever the loggers do.

    It is that of the run and not of the attempt: a fit that goes on from its own last checkpoint does not name it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save once per command, on rank zero."""
        if trainer.is_global_zero and trainer.state.fn and not getattr(trainer, "fast_dev_run", False):
            config, run_dir = self.config.clone(), Path(trainer.default_root_dir)
            config.trainer.default_root_dir = None  # which goes by --run_dir, also where that is another one next time
            if trainer.state.fn == "fit" and is_last(run_dir, config.get("ckpt_path")):
                config.ckpt_path = None
            text = self.parser.dump(config, skip_none=False)
            write_atomically(run_dir / f"{trainer.state.fn.value}.yaml", text.encode())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse schedules that could not work; before, they were not there to look at."""
        check_monitors(trainer)
