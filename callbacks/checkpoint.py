"""Checkpoints of a run: `best.ckpt`, `last.ckpt` and `previous.ckpt`, written atomically and checked when read."""

from __future__ import annotations

import filecmp
import io
import itertools
import math
import os
import struct
import tempfile
import uuid
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
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
from labn.io.atomic import remove_leftovers, write_atomically, write_error
from labn.io.preprocessing import KEY
from labn.models.checkpoints import read_checkpoint
from labn.modules.plain_checkpoints import SPAWNED, PlainCheckpointIO
from labn.modules.provenance import TRAINED_ON, training_hash

BEST, LAST, PREVIOUS, SUFFIX = "best", "last", "previous", ".ckpt"
# Keys of a checkpoint file; a change makes checkpoints of earlier versions lose what they hold.
PLATEAUS, ROW, FIT = "due_plateau_steps", "row_of_the_epoch", "fit_identity"
INSTEAD: dict[str, tuple[str, ...]] = {BEST: (), LAST: (PREVIOUS,)}
"""Value of `--ckpt_path` -> checkpoints that are used in its place when its file is damaged."""


def damage(path: Path) -> str | None:
    """The reason why a checkpoint file is damaged; None for an intact file.

    Every record of the zip archive is read and compared with its CRC-32 checksum. `torch.load` compares no checksums,
    so that it detects a truncated file but not a changed byte.
    """
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, struct.error) as error:
        return str(error)
    return None if bad is None else f"{bad} does not have its checksum"


def has_last(run_dir: Path) -> bool:
    """Whether a run has a checkpoint that `fit` can resume from."""
    return any(path.is_file() for path in last_paths(run_dir))


def is_last(run_dir: Path, path: str | Path | None) -> bool:
    """Whether `path` is one of the run's own `last.ckpt` and `previous.ckpt`."""
    return path is not None and Path(path).absolute() in [last.absolute() for last in last_paths(run_dir)]


def last_paths(run_dir: Path) -> list[Path]:
    """Paths of `last.ckpt` and of the checkpoints that replace a damaged one."""
    return [run_dir / "checkpoints" / f"{name}.ckpt" for name in (LAST, *INSTEAD[LAST])]


def find_checkpoint(run_dir: Path, which: str) -> str:
    """Path of the `best` or `last` checkpoint of a run.

    A damaged `last.ckpt` is replaced by `previous.ckpt`, with a warning.

    Raises:
        MissingFileError: the run has no such checkpoint.
        InputError: every candidate is damaged.
    """
    folder = run_dir / "checkpoints"
    wanted = folder / f"{which}.ckpt"
    troubles = {path: damage(path) for path in (wanted, *(folder / f"{name}.ckpt" for name in INSTEAD[which]))}
    reason = f"is damaged ({troubles[wanted]})" if wanted.is_file() else "is missing"
    for path, trouble in troubles.items():
        if trouble is None:
            if path != wanted:
                warnings.warn(f"{wanted} {reason}; resuming from {path}, an epoch earlier.", stacklevel=2)
            return str(path)
    if not any(path.is_file() for path in troubles):
        raise MissingFileError(f"--ckpt_path {which}: {wanted} does not exist; run fit with this configuration first.")
    raise InputError(
        f"--ckpt_path {which}: {wanted} {reason}; give another checkpoint, or run fit without --ckpt_path."
    )


def named_classes(thing: Any) -> set[str]:
    """All values of `class_path` and `backbone` in a configuration or a section of one, at any depth."""
    plain = vars(thing) if isinstance(thing, Namespace) else thing
    items = list(plain.values()) if isinstance(plain, dict) else plain if isinstance(plain, (list, tuple)) else []
    own = {str(plain[key]) for key in ("class_path", "backbone") if key in plain} if isinstance(plain, dict) else set()
    return own.union(*map(named_classes, items))


class RunCheckpointIO(PlainCheckpointIO):
    """Writes checkpoints atomically, keeps the preceding `last.ckpt` as `previous.ckpt`, and removes only own files.

    Lightning's `TorchCheckpointIO` writes to the system's temporary folder and moves the file to its final name.
    Between two file systems a move is a copy, and a process killed during the copy leaves half a checkpoint under the
    final name. This class writes into the target folder and renames.

    Lightning's checkpoint callbacks delete the files that are named in their restored state, and a checkpoint may come
    from an untrusted source. Paths outside `folders` are therefore removed from the states on loading, and no file
    outside `folders` is ever deleted.

    Args:
        folders: folders whose checkpoints the present run may delete.
    """

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        self.folders = {resolved(folder) for folder in folders}

    def owns(self, path: str | Path) -> bool:
        """Whether `path`, after symbolic links and `..` are resolved, lies in one of the folders."""
        return any(resolved(path).is_relative_to(folder) for folder in self.folders)

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content of a checkpoint; callback states are stripped of paths outside the run folder.

        Raises:
            MissingFileError: the local file does not exist.
            InputError: the file refers to code, is damaged, or is not a checkpoint of a LightningModule.
        """
        content = super().load_checkpoint(path, map_location, weights_only)
        states = content.get("callbacks")
        # Only the states are filtered: their keys contain settings such as `val/loss`, which look like paths.
        named = states.items() if isinstance(states, dict) else ()
        content["callbacks"] = {name: without_paths(state, self.owns) for name, state in named}
        return content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint atomically: the file appears complete or not at all.

        Raises:
            FileError: the folder is not writable, or the disk is full.
        """
        # A remote store has no hard links and no rename; fsspec writes there.
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        # Serialised in memory first, so that an error in torch.save leaves the files on disk as they were.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if path.stem == LAST and damage(path) is None:
            keep_as(path, path.with_name(f"{PREVIOUS}{path.suffix}"))
        write_atomically(path, buffer.getbuffer())

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint of the present run; for any other path, warn and delete nothing.

        Lightning's own method deletes every path that a callback names, folders with their content included.
        """
        handed_over = Path(path).name == SPAWNED and resolved(path).parent.parent == resolved(tempfile.gettempdir())
        if (handed_over or self.owns(path)) and Path(path).suffix == SUFFIX and not Path(path).is_dir():
            Path(path).unlink(missing_ok=True)
        else:
            warnings.warn(f"{path} is no checkpoint of this run and is not removed.", stacklevel=2)


def resolved(path: str | Path) -> Path:
    """The absolute path with symbolic links and `..` resolved; the file need not exist."""
    return Path(os.path.realpath(path))


PATH_FIELDS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
"""Fields that hold paths in the states of Lightning's checkpoint callbacks."""


def without_paths(state: Any, allowed: Callable[[str], bool]) -> Any:
    """A copy of a callback state without forbidden paths, at any depth.

    A string counts as a path if it contains a separator or stands under one of `PATH_FIELDS`. A forbidden value becomes
    an empty string; an entry whose key is a forbidden path is dropped.

    Args:
        state: state of a callback, or a value inside one.
        allowed: tells whether a path may stay.
    """
    if isinstance(state, dict):
        entries = {key: value for key, value in state.items() if not _is_path(key) or allowed(key)}
        return {
            key: _cleared(value, allowed) if key in PATH_FIELDS else without_paths(value, allowed)
            for key, value in entries.items()
        }
    if isinstance(state, (list, tuple)):
        return type(state)(without_paths(item, allowed) for item in state)
    return "" if _is_path(state) and not allowed(state) else state


def _is_path(thing: Any) -> bool:
    return isinstance(thing, str) and ("/" in thing or "\\" in thing or thing in ("..", "."))


def _cleared(field: Any, allowed: Callable[[str], bool]) -> Any:
    """The allowed paths of a field from `PATH_FIELDS`, which is a string or a dict with paths as keys.

    In these fields a bare file name, without a separator, is a path too.
    """
    if isinstance(field, dict):
        return {key: value for key, value in field.items() if isinstance(key, str) and allowed(key)}
    return field if isinstance(field, str) and field and allowed(field) else ""


def same_content(first: Path, second: Path) -> bool:
    """Whether two files exist and are equal byte by byte."""
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def keep_as(path: Path, name: Path) -> None:
    """Make `name` refer to the content of `path` atomically: by a hard link if possible, else by renaming `path`."""
    # os.link cannot replace an existing file, os.replace can; so the link gets a temporary name first.
    link = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
        os.replace(link, name)
    except OSError:
        os.replace(path, name)


class RunCheckpoint(ModelCheckpoint):
    """Base of `BestCheckpoint` and `LastCheckpoint`: one file with a fixed name in `<run_dir>/checkpoints/`."""

    _due: Sequence[float | None] = ()
    _row: Mapping[str, float] = {}
    _restored: Set[str] = frozenset()
    # The folder that `setup` has chosen; any other `dirpath` is the user's own.
    _chosen: str | None = None
    _fitted_by: weakref.ref[pl.Trainer] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the folder to `<run_dir>/checkpoints` and install `RunCheckpointIO`.

        The first fit of another trainer begins anew, with the folder and the best value of its own run.
        """
        if stage == "fit":
            # What an earlier fit, or a test of a checkpoint, has read does not concern this fit.
            self._due, self._row, self._restored = (), {}, frozenset()
            if self._fitted_by is None or self._fitted_by() is not trainer:
                self.forget()
                self._fitted_by = weakref.ref(trainer)
        # ModelCheckpoint would otherwise choose a folder that depends on the first logger.
        if self.dirpath is None:
            self.dirpath = self._chosen = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        # An exact type: a subclass, such as one for asynchronous writing, is the user's own choice.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = RunCheckpointIO()
        if isinstance(trainer.strategy.checkpoint_io, RunCheckpointIO):
            trainer.strategy.checkpoint_io.folders.add(resolved(self.dirpath))
        if trainer.is_global_zero and stage == "fit":
            remove_leftovers(Path(self.dirpath))
        is_chosen = self.dirpath == self._chosen
        super().setup(trainer, pl_module, stage=stage)
        # ModelCheckpoint replaces the folder by that of the first process.
        self._chosen = str(self.dirpath) if is_chosen else None

    def forget(self) -> None:
        """Set everything that a fit leaves in this callback to its initial value; files stay as they are."""
        if self.dirpath == self._chosen:
            self.dirpath = None
        self.current_score = self.best_model_score = None
        self.best_k_models = {}
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_model_path = self.kth_best_model_path = self.last_model_path = self._last_checkpoint_saved = ""
        # Lightning saves nothing at a step at which it believes that it has saved.
        self._last_global_step_saved, self._last_time_checked = 0, None
        self._defer_save_until_validation = False

    def __getstate__(self) -> dict[str, Any]:
        """The attributes without the trainer, to which a reference cannot be pickled for a spawned process."""
        return {**self.__dict__, "_fitted_by": None}

    @property
    def path(self) -> Path:
        """Path of the checkpoint that this callback writes; valid after `setup`."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.filename}{SUFFIX}"

    def state_dict(self) -> dict[str, Any]:
        """The monitor with its best and current value; without paths, because a run folder may be moved or copied."""
        return {"monitor": self.monitor, "best_model_score": self.best_model_score, "current_score": self.current_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value and its file from the run folder; `state_dict` is ignored.

        The loaded checkpoint may belong to another folder or come from an untrusted source, whereas the checkpoint in
        the run folder contains the monitored value for which it was saved.
        """
        score = kept_score(self.path)
        if score is not None or (self.monitor is None and self.path.is_file()):
            self.best_model_path = self.kth_best_model_path = str(self.path)
        if score is not None:
            # ModelCheckpoint decides by `kth_value` and `best_k_models`; `best_model_score` is only what it shows.
            self.best_model_score = self.kth_value = score
            self.best_k_models = {str(self.path): score}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the preprocessing of the data, so that the file can be used alone, and what a resumed fit needs."""
        checkpoint[PLATEAUS], checkpoint[ROW] = due_plateaus(trainer), row_of_epoch(trainer)
        preprocessing = getattr(getattr(trainer, "datamodule", None), "preprocessing", None)
        if preprocessing is not None:
            checkpoint[KEY] = preprocessing().plain()
            checkpoint[TRAINED_ON] = training_hash(trainer.datamodule)  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the pending scheduler steps, the pending log row and the names of the restored callbacks.

        Raises:
            InputError: the steps or the row are no numbers.
        """
        self._restored = frozenset(checkpoint.get("callbacks", {}))
        # `pop`: only the first checkpoint callback gets them, so that two callbacks do not apply them twice.
        self._due, self._row = checkpoint.pop(PLATEAUS, []), checkpoint.pop(ROW, {})
        steps = [value for value in self._due if value is not None] if isinstance(self._due, list) else [None]
        named = isinstance(self._row, dict) and all(isinstance(name, str) for name in self._row)
        numbers = [*steps, *(self._row.values() if named else [None])]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise InputError(
                f"{trainer.ckpt_path} cannot be restored: its fields {PLATEAUS} and {ROW} must hold numbers; give "
                "another checkpoint."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last epoch's metrics again after a resume.

        A process that was killed between saving and logging has not written them. Duplicate rows are possible.
        """
        row, self._row = dict(self._row), {}
        # At this point trainer.global_step is still 0; Lightning restores it later.
        step = int(row.pop("step", 0))
        for logger in trainer.loggers if row else []:
            logger.log_metrics(row, step=step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the pending scheduler steps, and stop again where early stopping had ended the run.

        Lightning saves a checkpoint before the epoch's step of a plateau scheduler and does not repeat that step after
        a resume, so that the learning rate would fall an epoch late. It also does not restore that early stopping had
        ended the run.
        """
        super().on_train_start(trainer, pl_module)
        for config, value in zip(trainer.lr_scheduler_configs, self._due):
            if value is not None:
                pl_module.lr_scheduler_step(config.scheduler, value)
        self._due = []
        for callback in callbacks_of(trainer):
            # A callback that is used for a second fit still has the count of the first one.
            if not isinstance(callback, EarlyStopping) or callback.state_key not in self._restored:
                continue
            if callback.wait_count >= max(callback.patience, 1):
                trainer.should_stop = True
                rank_zero_info(f"{callback.monitor} had not improved for {callback.wait_count} epochs: fit is over.")


def check_monitors(trainer: pl.Trainer) -> None:
    """Raise if a fit without validation has early stopping or a scheduler that monitors a validation value.

    Without this check such a fit would fail at the end of its first epoch. Schedulers exist from the start of training
    on, so that a call before that checks early stopping alone.

    Raises:
        InputError: `trainer.limit_val_batches` is 0 and a `val/...` value is monitored.
    """
    if trainer.limit_val_batches != 0:
        return
    stopping = [c for c in callbacks_of(trainer) if isinstance(c, EarlyStopping) and c.strict]
    schedules = [c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and c.strict]
    watched = [*((type(c), c.monitor) for c in stopping), *((type(c.scheduler), c.monitor) for c in schedules)]
    for kind, monitor in watched:
        if str(monitor).startswith("val/"):
            raise InputError(
                f"trainer.limit_val_batches is 0, so that {kind.__name__} never gets its monitored value {monitor}; "
                "set trainer.limit_val_batches to 1 or more."
            )


def epoch_is_over(trainer: pl.Trainer) -> bool:
    """Whether all batches of the epoch are done; its scheduler steps and log row follow after checkpoints are saved."""
    # Lightning counts an epoch as processed before these callbacks and as completed after them.
    progress = trainer.fit_loop.epoch_progress.current.state_dict()
    return bool(progress["processed"] == progress["completed"] + 1)


def row_of_epoch(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics that Lightning will log for the finished epoch; empty in the middle of an epoch.

    Validation metrics are not among them: Lightning has logged these before it saves.
    """
    results = trainer._results
    if results is None or not epoch_is_over(trainer):
        return {}
    logged = {name: float(value) for name, value in results.metrics(on_step=False)["log"].items()}
    return {**logged, "epoch": trainer.current_epoch, "step": trainer.global_step - 1} if logged else {}


def due_plateaus(trainer: pl.Trainer) -> list[float | None]:
    """Per scheduler, the monitored value of its pending step at the end of an epoch; None if no step is pending."""
    over = epoch_is_over(trainer)
    # The conditions under which Lightning itself steps a plateau scheduler at the end of an epoch.
    due = [
        over and c.reduce_on_plateau and c.interval == "epoch" and (trainer.current_epoch + 1) % c.frequency == 0
        for c in trainer.lr_scheduler_configs
    ]
    monitored = [trainer.callback_metrics.get(c.monitor or "") for c in trainer.lr_scheduler_configs]
    return [float(value) if is_due and value is not None else None for is_due, value in zip(due, monitored)]


def kept_score(path: Path) -> Tensor | None:
    """The monitored value stored in a best checkpoint; None if the file is missing, damaged or has no value."""
    if damage(path) is not None:
        return None
    states = read_checkpoint(path).get("callbacks")
    for name, state in states.items() if isinstance(states, dict) else ():
        score = state.get("best_model_score") if isinstance(state, dict) else None
        if str(name).startswith(BestCheckpoint.__name__) and score is not None:
            return torch.as_tensor(score, dtype=torch.float32).reshape(())
    return None


def fit_in(path: Path) -> str | None:
    """The identity of the fit that saved a checkpoint; None if the file is missing, unreadable or has no identity."""
    try:
        content = None if damage(path) is not None else read_checkpoint(path)
    except InputError:
        return None
    return fit_of(content)


def fit_of(content: Any) -> str | None:
    """The identity of a fit in the content of its checkpoint; None if there is none, as in those of version 0.1."""
    fit = content.get(FIT) if isinstance(content, dict) else None
    return fit if isinstance(fit, str) and fit else None


class BestCheckpoint(RunCheckpoint):
    """Save `best.ckpt`, the checkpoint of the epoch with the best monitored value.

    A fit that resumes from a checkpoint in another folder copies the `best.ckpt` beside it, unless its own folder has
    one. Otherwise the first epoch in the new folder would count as the best, whatever its value.

    Every fresh fit has a random identity, which all its checkpoints contain and a resumed fit takes over. A `best.ckpt`
    of another fit in the folder of a resumed one is renamed to `best.old-1.ckpt`, with a warning: its value would
    otherwise stand for epochs of which it knows nothing.

    Args:
        monitor: name of the logged value.
        mode: `min` or `max`.
        kwargs: further arguments of Lightning's `ModelCheckpoint`.
    """

    _fit = ""

    def __init__(self, monitor: str = "val/loss", mode: str = "min", **kwargs: Any) -> None:
        super().__init__(filename=BEST, monitor=monitor, mode=mode, enable_version_counter=False, **kwargs)

    def forget(self) -> None:
        """Forget the earlier fit, and choose an identity for the next one."""
        super().forget()
        self._fit = uuid.uuid4().hex

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the identity of the fit to what every checkpoint of a run has."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[FIT] = self._fit

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the identity and the best checkpoint of the resumed fit; a collective."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        # A trial run with `fast_dev_run` saves no checkpoint, so that it changes none either.
        if trainer.state.fn != "fit" or not trainer.ckpt_path or getattr(trainer, "fast_dev_run", False):
            return
        self._fit = fit_of(checkpoint) or self._fit
        # Only the first process saves checkpoints, so that the files concern no other.
        if trainer.is_global_zero:
            self._take_over(Path(trainer.ckpt_path), fit_of(checkpoint))
        trainer.strategy.barrier("labn-best")

    def _take_over(self, resumed: Path, fit: str | None) -> None:
        """Set `best.ckpt` of a foreign fit aside, and copy the one beside the resumed checkpoint if there is none.

        Args:
            resumed: the checkpoint from which this fit resumes.
            fit: identity in that checkpoint.
        """
        source, own = resumed.with_name(self.path.name), fit_in(self.path)
        if fit is not None and own is not None and fit != own:
            aside = self._aside()
            try:
                os.replace(self.path, aside)
            except OSError as error:
                raise write_error(aside, error) from error
            warnings.warn(f"{self.path} is of another fit than {resumed}; it is now {aside}.", stacklevel=2)
        elif fit is None and own is not None:
            # A resumed fit without an identity may have improved `best.ckpt` and died before it saved `last.ckpt`.
            self._fit = own
        if not self.path.is_file():
            is_foreign = fit is not None and fit_in(source) not in (fit, None)
            if damage(source) is None and not is_foreign:
                write_atomically(self.path, source.read_bytes())
        elif None in (fit, own) and resolved(source) != resolved(self.path) and not same_content(source, self.path):
            warnings.warn(
                f"{self.path} stays the best checkpoint, but may be of another fit than {resumed}.", stacklevel=2
            )

    def _aside(self) -> Path:
        """The first unused one of the names `best.old-1.ckpt`, `best.old-2.ckpt` and so on."""
        names = (self.path.with_name(f"{self.path.stem}.old-{number}{SUFFIX}") for number in itertools.count(1))
        return next(name for name in names if not os.path.lexists(name))


class LastCheckpoint(RunCheckpoint):
    """Save `last.ckpt` after every epoch, and keep the one of the epoch before as `previous.ckpt`.

    Lightning's option `save_last` writes only in epochs that are saved for another reason, such as a new best value; a
    killed run would resume from its best epoch. List this callback after `BestCheckpoint`, whose state it saves.
    """

    def __init__(self) -> None:
        super().__init__(filename=LAST, enable_version_counter=False, save_on_train_epoch_end=True)
