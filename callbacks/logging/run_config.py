"""The run folder of a command: its resolved configuration, and a watch over the files that it relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.checkpoint import check_monitors, is_last
from labn.errors import InputError, without_credentials
from labn.io.atomic import check_not_removed, write_atomically
from labn.io.readers import read_yaml
from labn.launch.run_lock import check_held

FREE_SETTINGS = (
    "ckpt_path",
    "run_dir",
    "wandb",
    *(f"trainer.{name}" for name in ("default_root_dir", "max_", "enable_", "logger", "accelerator", "devices")),
    *(f"trainer.{name}" for name in ("num_nodes", "strategy", "log_every_n_steps")),
    *(f"data.init_args.{name}" for name in ("num_workers", "cache_", "root", "mask_root")),
)
"""Beginnings of the names of settings that a resumed fit may change: they say how long and where, not what."""


MAX_SHOWN = 100
"""Largest number of characters of a changed setting that a warning shows."""


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists count as one value.

    Example:
        >>> flat({"data": {"init_args": {"batch_size": 4}}, "seed": 1})
        {'data.init_args.batch_size': 4, 'seed': 1}
    """
    if not isinstance(config, dict) or not config:
        return {name: config}
    return {key: value for k, inner in config.items() for key, value in flat(inner, f"{name}.{k}".lstrip(".")).items()}


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
                self._warn_of_changes(run_dir / "fit.yaml", config)
            # Run folders are copied and shared; the password of a tracker's URI is for its owner alone.
            text = without_credentials(self.parser.dump(config, skip_none=False))
            path = run_dir / f"{trainer.state.fn.value}.yaml"
            write_atomically(path, text.encode())
            self._needed = (path, *self._read_files(trainer, run_dir))

    def _warn_of_changes(self, path: Path, config: Any) -> None:
        """Warn of settings that a resumed fit has not begun with, except those that a resume may well change."""
        try:
            earlier = flat(read_yaml(path))
        except (OSError, InputError):
            return
        current = flat(yaml.safe_load(self.parser.dump(config, skip_none=False)))
        names = [name for name in {**earlier, **current} if not name.startswith(FREE_SETTINGS)]
        changed = [n for n in names if n in current and earlier.get(n, current[n]) != current[n]]
        if changed:
            texts = {name: f"{current[name]} (was {earlier[name]})" for name in changed}
            shown = ", ".join(f"{name} {text if len(text) <= MAX_SHOWN else '...'}" for name, text in texts.items())
            rank_zero_warn(f"fit goes on with other settings than it began with: {shown}; its epochs have both.")

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
