"""The run folder of a command: its resolved configuration, and a watch over the files that it relies on."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from callbacks.checkpoint import check_monitors, is_last
from labn.io.atomic import check_not_removed, write_atomically
from labn.launch.run_lock import check_held


class RunConfigCallback(SaveConfigCallback):
    """Write the resolved configuration to `<run_dir>/<subcommand>.yaml`.

    The file describes the run, not the attempt: a fit that resumes from its own last checkpoint does not mention that
    checkpoint.
    """

    _needed: tuple[Path, ...] = ()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration, on rank zero."""
        if trainer.is_global_zero and trainer.state.fn and not getattr(trainer, "fast_dev_run", False):
            config, run_dir = self.config.clone(), Path(trainer.default_root_dir)
            config.trainer.default_root_dir = None  # the command line sets it to --run_dir, which may differ next time
            if trainer.state.fn == "fit" and is_last(run_dir, config.get("ckpt_path")):
                config.ckpt_path = None
            text = self.parser.dump(config, skip_none=False)
            path = run_dir / f"{trainer.state.fn.value}.yaml"
            write_atomically(path, text.encode())
            self._needed = (path, *self._read_files(trainer, run_dir))

    def _read_files(self, trainer: pl.Trainer, run_dir: Path) -> list[Path]:
        """Files of the run folder that a test or validation belongs to; a fit replaces them itself."""
        if trainer.state.fn == "fit":
            return []
        tested = Path(trainer.ckpt_path or "")
        paths = [run_dir / "fit.yaml", *([tested] if tested.absolute().is_relative_to(run_dir.absolute()) else [])]
        return [path for path in paths if path.is_file()]

    def check_run_folder(self, trainer: pl.Trainer) -> None:
        """Check that the run folder, and its lock, are still those of this command; rank zero only.

        Raises:
            FileError: the configuration or a checkpoint of this command has been removed.
            InputError: another process has taken the lock.
        """
        if self._needed:
            run_dir = Path(trainer.default_root_dir)
            named = [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
            saved = [Path(name) for name in named if name and trainer.state.fn == "fit"]
            for path in (*self._needed, *(path for path in saved if path.is_relative_to(run_dir.absolute()))):
                check_not_removed(path)
            check_held(run_dir, self._needed[0].stem)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the run folder after every epoch, so that no training goes on without one."""
        self.check_run_folder(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the monitors of the schedulers, which exist from here on."""
        check_monitors(trainer)
