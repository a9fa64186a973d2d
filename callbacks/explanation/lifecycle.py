"""The schedule and the lifecycle of explaining callbacks: which epochs and samples are explained, and the hooks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.checks import ConfigurationError, check_strategy
from labn.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Epochs and samples that are explained.

    Attributes:
        val_images: images explained at validation end while fitting, evenly spaced over the split.
        test_images: images explained at test end and by `validate`; None explains all.
        every_n_epochs: explain every n-th validation epoch while fitting; 0 never does.

    Raises:
        InputError: a number is negative, or `test_images` is 0.
    """

    val_images: int = 8
    test_images: int | None = None
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        check_counts(**vars(self))

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the current epoch of the running command is explained."""
        # The sanity check runs before the first epoch, on untrained weights; its maps would lie in the folder of epoch
        # 0.
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != "fit" or (
            self.is_ever_due(trainer) and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        )

    def is_ever_due(self, trainer: pl.Trainer) -> bool:
        """Whether any epoch of the running command is explained."""
        # The minimum is 0 if any of the three switches validation explanations off.
        return trainer.state.fn != "fit" or min(self.every_n_epochs, self.val_images, trainer.limit_val_batches) > 0

    def samples(self, trainer: pl.Trainer, size: int) -> list[int]:
        """Indices of the explained samples of a split with `size` samples."""
        return evenly_spaced(size, self.val_images if trainer.state.fn == "fit" else self.test_images)


class StageCallback(pl.Callback):
    """Base of the explaining callbacks: it maps Lightning's hooks to `begin`, `work`, `finish` and `publish`.

    Subclasses override these four methods. They are called only in epochs that `schedule` selects.
    """

    # Lightning calls on_*_epoch_end of callbacks before it reduces the values that the module logs, and on_*_end after
    # that. Scores are therefore logged in `finish`, and files that show logged values are written in `publish`.
    schedule: Schedule

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Called once per stage, on every rank, before the first batch."""

    def work(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, position: tuple[Any, ...]) -> None:
        """Called per batch; must not call collectives, because ranks may have different numbers of batches.

        Args:
            trainer: the trainer.
            pl_module: the module.
            batch: as the data loader gives it.
            position: (split, epoch, loader, batch), unique among the batches of a run.
        """

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Called once per stage, on every rank, after the last batch."""

    def publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Called once per stage, on every rank, after the module has logged the stage's metrics."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the trainer's settings.

        Raises:
            ConfigurationError: evaluation runs in inference mode, or the strategy shards parameters.
        """
        # Lightning runs whole evaluation loops, callbacks included, in inference mode, in which `torch.enable_grad`
        # has no effect: tensors that were made there can never enter a graph.
        if any(loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop)):
            raise ConfigurationError(
                f"{type(self).__name__} needs gradients at validation and test end: "
                "set trainer.inference_mode to false."
            )
        check_strategy(type(trainer.strategy).__name__)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a validation."""
        if self.schedule.is_due(trainer):
            self.begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a test."""
        if self.schedule.is_due(trainer):
            self.begin(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Work on a validation batch."""
        if self.schedule.is_due(trainer):
            self.work(trainer, pl_module, batch, ("val", trainer.current_epoch, dataloader_idx, batch_idx))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Work on a test batch."""
        if self.schedule.is_due(trainer):
            self.work(trainer, pl_module, batch, ("test", 0, dataloader_idx, batch_idx))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish a validation."""
        if self.schedule.is_due(trainer):
            self.finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish a test."""
        if self.schedule.is_due(trainer):
            self.finish(trainer, pl_module, "test")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish a validation."""
        if self.schedule.is_due(trainer):
            self.publish(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish a test."""
        if self.schedule.is_due(trainer):
            self.publish(trainer, pl_module, "test")


def stage_folder(trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> Path:
    """Results folder of the current stage, the same on every rank; a collective.

    The folder is `<run_dir>/test` or `<run_dir>/val/epoch=003`; with `fast_dev_run` it lies in a temporary folder.
    """
    stage = f"val/{epoch_of(trainer, pl_module)}" if split == "val" else split
    fast = getattr(trainer, "fast_dev_run", False)
    root = Path(tempfile.mkdtemp(prefix="labn-")) if fast else Path(trainer.default_root_dir)
    # Broadcast, because every rank has made a temporary folder of its own.
    return Path(trainer.strategy.broadcast(str(root))) / stage


def epoch_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """The epoch of the explained weights as `epoch=003`: that of the running fit, else that of the loaded checkpoint.

    The name of a validation in the middle of an epoch also contains the step, so that it has its own folder.
    """
    if trainer.state.fn == "fit":
        step = "" if trainer.is_last_batch else f"-step={trainer.global_step}"
        return f"epoch={trainer.current_epoch:03d}{step}"
    return f"epoch={getattr(pl_module, 'loaded_epoch', None) or 0:03d}"


def evenly_spaced(size: int, count: int | None) -> list[int]:
    """At most `count` indices, evenly spaced over `range(size)` and the same in every call; None gives all."""
    if count is None or count >= size:
        return list(range(size))
    # Both ends are included. A set, because rounding may give an index twice.
    return sorted({round(k * (size - 1) / max(count - 1, 1)) for k in range(count)})


def check_counts(**counts: int | None) -> None:
    """Check numbers of images or epochs; None stands for all.

    Raises:
        InputError: a number is negative, or `test_images` is 0, which would give empty tables.
    """
    for name, count in counts.items():
        least = int(name == "test_images")
        if count is not None and count < least:
            raise InputError(f"{name} is {count}; it must be at least {least}{', or null for all' * least}.")
