"""Checkpoints under names that every later command finds."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.explanation.base import callbacks_of
from labn.errors import InputError, MissingFileError
from labn.io.atomic import remove_leftovers, write_atomically
from labn.io.preprocessing import KEY
from labn.models.checkpoints import read_checkpoint
from labn.modules.plain_checkpoints import PlainCheckpointIO

BEST, LAST, PREVIOUS, SUFFIX = "best", "last", "previous", ".ckpt"
PLATEAUS, ROW = "due_plateau_steps", "row_of_the_epoch"
INSTEAD: dict[str, tuple[str, ...]] = {BEST: (), LAST: (PREVIOUS,)}
"""Checkpoints that can be named -> what takes their place when they are damaged."""


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be whole, None where it is: every record is read and compared with its checksum.

    Loading alone compares no checksum, so that it finds a truncated file but no changed byte.
    """
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, struct.error) as error:
        return str(error)
    return None if bad is None else f"{bad} does not have its checksum"


def has_last(run_dir: Path) -> bool:
    """Whether a run has a checkpoint to go on from."""
    return any(path.is_file() for path in last_paths(run_dir))


def is_last(run_dir: Path, path: str | Path | None) -> bool:
    """Whether `path` is the checkpoint from which a fit of this run goes on by itself."""
    return path is not None and Path(path).absolute() in [last.absolute() for last in last_paths(run_dir)]


def last_paths(run_dir: Path) -> list[Path]:
    """`last.ckpt` and what takes its place."""
    return [run_dir / "checkpoints" / f"{name}.ckpt" for name in (LAST, *INSTEAD[LAST])]


def find_checkpoint(run_dir: Path, which: str) -> str:
    """Path of the whole `best` or `last` checkpoint of a run; where `last` is damaged, of the one before, saying so.

    Raises:
        FileNotFoundError: the run has none.
        ValueError: all that it has is damaged.
    """
    folder = run_dir / "checkpoints"
    wanted = folder / f"{which}.ckpt"
    troubles = {path: damage(path) for path in (wanted, *(folder / f"{name}.ckpt" for name in INSTEAD[which]))}
    reason = f"is damaged ({troubles[wanted]})" if wanted.is_file() else "is missing"
    for path, trouble in troubles.items():
        if trouble is None:
            if path != wanted:
                warnings.warn(f"{wanted} {reason}; going on from {path}, an epoch earlier.", stacklevel=2)
            return str(path)
    if not any(path.is_file() for path in troubles):
        raise MissingFileError(f"--ckpt_path {which}: {wanted} does not exist; run fit with this configuration first.")
    raise InputError(
        f"--ckpt_path {which}: {wanted} {reason}; give another checkpoint, or run fit without --ckpt_path."
    )


def named_classes(thing: Any) -> set[str]:
    """Class paths that a part of a configuration names, at any depth."""
    plain = vars(thing) if isinstance(thing, Namespace) else thing
    items = list(plain.values()) if isinstance(plain, dict) else plain if isinstance(plain, (list, tuple)) else []
    own = {str(plain["class_path"])} if isinstance(plain, dict) and "class_path" in plain else set()
    return own.union(*map(named_classes, items))


class RunCheckpointIO(PlainCheckpointIO):
    """Writes a checkpoint beside its final name and renames it, and keeps what was `last` as `previous`.

    Lightning's own writes to the system's temporary folder and moves the file from there, which between two file
    systems is a copy: a process killed meanwhile leaves half a checkpoint under the final name.

    A checkpoint that is read may come from a stranger, and the callbacks of Lightning remove the files that their
    states name. So states are cleared of paths that lead out of `folders`, and no file outside of them is removed.

    Args:
        folders: folders whose checkpoints the present run may remove.
    """

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        self.folders = {resolved(folder) for folder in folders}

    def owns(self, path: str | Path) -> bool:
        """Whether `path`, with links and `..` followed, lies in one of the folders."""
        return any(resolved(path).is_relative_to(folder) for folder in self.folders)

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, its callbacks' states without paths that lead out of the run folder.

        Raises:
            MissingFileError: there is no such local file.
            InputError: the file names code, is damaged, or is no checkpoint of a LightningModule.
        """
        content = super().load_checkpoint(path, map_location, weights_only)
        states = content.get("callbacks")
        # Names of callbacks hold their settings, such as a monitor with a slash, and are no paths.
        named = states.items() if isinstance(states, dict) else ()
        content["callbacks"] = {name: without_paths(state, self.owns) for name, state in named}
        return content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save whole or not at all.

        Raises:
            FileError: the folder cannot be written, or the disk is full.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if path.stem == LAST and damage(path) is None:
            keep_as(path, path.with_name(f"{PREVIOUS}{path.suffix}"))
        write_atomically(path, buffer.getbuffer())

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint of the present run; anything else stays, with a warning.

        Lightning removes whatever a callback names, folders with all that they hold.
        """
        if self.owns(path) and Path(path).suffix == SUFFIX and not Path(path).is_dir():
            Path(path).unlink(missing_ok=True)
        else:
            warnings.warn(f"{path} is no checkpoint of this run and is not removed.", stacklevel=2)


def resolved(path: str | Path) -> Path:
    """The absolute path with links and `..` followed, of a file that need not exist."""
    return Path(os.path.realpath(path))


PATH_FIELDS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
"""Fields of the states of Lightning's checkpoint callbacks that hold paths."""


def without_paths(state: Any, allowed: Callable[[str], bool]) -> Any:
    """The state of callbacks without the paths that are not allowed, at any depth.

    A path is every text with a separator, and everything under the names of `PATH_FIELDS`. In place of a path stands
    an empty text; a key that is a path goes with its value.
    """
    if isinstance(state, dict):
        kept = {key: value for key, value in state.items() if not _is_path(key) or allowed(key)}
        return {
            key: _cleared(value, allowed) if key in PATH_FIELDS else without_paths(value, allowed)
            for key, value in kept.items()
        }
    if isinstance(state, (list, tuple)):
        return type(state)(without_paths(item, allowed) for item in state)
    return "" if _is_path(state) and not allowed(state) else state


def _is_path(thing: Any) -> bool:
    return isinstance(thing, str) and ("/" in thing or "\\" in thing or thing in ("..", "."))


def _cleared(field: Any, allowed: Callable[[str], bool]) -> Any:
    """A field of paths: a text, or a dict whose keys are paths; a name without a folder is a path as well."""
    if isinstance(field, dict):
        return {key: value for key, value in field.items() if isinstance(key, str) and allowed(key)}
    return field if isinstance(field, str) and field and allowed(field) else ""


def keep_as(path: Path, name: Path) -> None:
    """Let `name` be what `path` is, at once; where the file system has no links `path` itself is renamed."""
    link = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
        os.replace(link, name)
    except OSError:
        os.replace(path, name)


class RunCheckpoint(ModelCheckpoint):
    """Base of `BestCheckpoint` and `LastCheckpoint`: one file of a fixed name in `<run_dir>/checkpoints/`."""

    _due: Sequence[float | None] = ()
    _row: Mapping[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Place the checkpoint in the run folder, whatever the loggers do, and let it be written whole."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = RunCheckpointIO()
        if isinstance(trainer.strategy.checkpoint_io, RunCheckpointIO):
            trainer.strategy.checkpoint_io.folders.add(resolved(self.dirpath))
        if trainer.is_global_zero and stage == "fit":
            remove_leftovers(Path(self.dirpath))
        super().setup(trainer, pl_module, stage=stage)

    @property
    def path(self) -> Path:
        """The file that this callback keeps; `setup` has placed it."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.filename}{SUFFIX}"

    def state_dict(self) -> dict[str, Any]:
        """The best value and the present one, without any path: a run folder may be moved, copied or linked."""
        return {"monitor": self.monitor, "best_model_score": self.best_model_score, "current_score": self.current_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which file is kept, and how good it is, from the run folder; the given state is not asked.

        A checkpoint may come from another folder, or from a stranger. The file in the run folder holds the value that
        it was kept for.
        """
        score = kept_score(self.path)
        if score is not None or (self.monitor is None and self.path.is_file()):
            self.best_model_path = self.kth_best_model_path = str(self.path)
        if score is not None:
            self.best_model_score = self.kth_value = score
            self.best_k_models = {str(self.path): score}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what pictures the network expects, so that the file can be used alone, and what a resumed fit needs."""
        checkpoint[PLATEAUS], checkpoint[ROW] = due_plateaus(trainer), row_of_epoch(trainer)
        preprocessing = getattr(getattr(trainer, "datamodule", None), "preprocessing", None)
        if preprocessing is not None:
            checkpoint[KEY] = preprocessing().plain()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over, for one callback of all, the steps of the schedules and the row of the log that are due."""
        self._due, self._row = checkpoint.pop(PLATEAUS, []), checkpoint.pop(ROW, {})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what a process that was killed after it had saved may have lost; where it has not, it is there twice."""
        row, self._row = dict(self._row), {}
        # The trainer's own count of steps is restored later.
        step = int(row.pop("step", 0))
        for logger in trainer.loggers if row else []:
            logger.log_metrics(row, step=step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on as if nothing had happened.

        Lightning saves before the epoch's step of the plateau schedules and leaves that step out when it goes on, so
        that the learning rate would fall an epoch late; and it forgets that early stopping had ended the run.
        """
        super().on_train_start(trainer, pl_module)
        for config, value in zip(trainer.lr_scheduler_configs, self._due):
            if value is not None:
                pl_module.lr_scheduler_step(config.scheduler, value)
        self._due = []
        for callback in callbacks_of(trainer):
            if isinstance(callback, EarlyStopping) and callback.wait_count >= max(callback.patience, 1):
                trainer.should_stop = True
                rank_zero_info(f"{callback.monitor} had not improved for {callback.wait_count} epochs: fit is over.")


def check_monitors(trainer: pl.Trainer) -> None:
    """Stop a fit without validation where early stopping or a schedule goes by what only a validation logs.

    Schedules are there from the start of training on.

    Raises:
        ValueError: it would fail at the end of its first epoch.
    """
    if trainer.limit_val_batches != 0:
        return
    stopping = [c for c in callbacks_of(trainer) if isinstance(c, EarlyStopping) and c.strict]
    schedules = [c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and c.strict]
    watched = [*((type(c), c.monitor) for c in stopping), *((type(c.scheduler), c.monitor) for c in schedules)]
    for kind, monitor in watched:
        if str(monitor).startswith("val/"):
            raise InputError(
                f"trainer.limit_val_batches is 0, so that {kind.__name__} never sees {monitor}, which it goes by; "
                "validate on something, as with trainer.limit_val_batches 1."
            )


def epoch_is_over(trainer: pl.Trainer) -> bool:
    """Whether the epoch is over but for the steps of its schedules and the row of the log, which come after a save."""
    progress = trainer.fit_loop.epoch_progress.current.state_dict()
    return bool(progress["processed"] == progress["completed"] + 1)


def row_of_epoch(trainer: pl.Trainer) -> dict[str, float]:
    """What Lightning will log of the epoch that is over; empty within an epoch, where later rows will tell.

    Values of the validation are in the log by then.
    """
    results = trainer._results
    if results is None or not epoch_is_over(trainer):
        return {}
    logged = {name: float(value) for name, value in results.metrics(on_step=False)["log"].items()}
    return {**logged, "epoch": trainer.current_epoch, "step": trainer.global_step - 1} if logged else {}


def due_plateaus(trainer: pl.Trainer) -> list[float | None]:
    """Per scheduler, what its epoch's step is still to see, where the epoch is over but for that step; else None."""
    over = epoch_is_over(trainer)
    due = [
        over and c.reduce_on_plateau and c.interval == "epoch" and (trainer.current_epoch + 1) % c.frequency == 0
        for c in trainer.lr_scheduler_configs
    ]
    seen = [trainer.callback_metrics.get(c.monitor or "") for c in trainer.lr_scheduler_configs]
    return [float(value) if wanted and value is not None else None for wanted, value in zip(due, seen)]


def kept_score(path: Path) -> Tensor | None:
    """The monitored value that a best checkpoint was kept for, as the file itself holds it; None without one."""
    if damage(path) is not None:
        return None
    states = read_checkpoint(path).get("callbacks")
    for name, state in states.items() if isinstance(states, dict) else ():
        score = state.get("best_model_score") if isinstance(state, dict) else None
        if str(name).startswith(BestCheckpoint.__name__) and score is not None:
            return torch.as_tensor(score, dtype=torch.float32).reshape(())
    return None


class BestCheckpoint(RunCheckpoint):
    """Keep `best.ckpt`, the epoch with the best monitored value.

    A fit that goes on from the checkpoint of another folder takes the `best.ckpt` beside that checkpoint along, unless
    its own folder has one: otherwise the first epoch of the new folder would count as the best, however bad it is.

    Args:
        monitor: logged value that decides.
        mode: `min` or `max`.
        kwargs: further arguments of Lightning's `ModelCheckpoint`.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", **kwargs: Any) -> None:
        super().__init__(filename=BEST, monitor=monitor, mode=mode, enable_version_counter=False, **kwargs)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the best checkpoint of the run that goes on; a collective."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn != "fit" or not trainer.ckpt_path:
            return
        source = Path(trainer.ckpt_path).with_name(self.path.name)
        if trainer.is_global_zero and not self.path.is_file() and damage(source) is None:
            write_atomically(self.path, source.read_bytes())
        trainer.strategy.barrier("labn-best")


class LastCheckpoint(RunCheckpoint):
    """Keep `last.ckpt`, every epoch, better or not, and as `previous.ckpt` the one before.

    Lightning's own `save_last` writes only in epochs that were saved for another reason, such as being the best, so
    that a killed run would fall back to its best epoch.
    List this callback after `BestCheckpoint`, whose state it saves.
    """

    def __init__(self) -> None:
        super().__init__(filename=LAST, enable_version_counter=False, save_on_train_epoch_end=True)
