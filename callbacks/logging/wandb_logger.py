"""The Weights & Biases logger of a command: what it loses never stops the run."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from labn.io.readers import first_line


class RunWandbLogger(WandbLogger):
    """Lightning's `WandbLogger`, which gives up with a warning, once, where Weights & Biases fails in the middle.

    Everything that it is given is in the run folder too. It is not asked again after a failure, because each attempt
    may wait for a service that has gone.
    """

    lost = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, or give up."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyper-parameters, or give up."""
        self._try(super().log_hyperparams, params)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures, or give up."""
        self._try(super().log_image, key, images, step, **kwargs)

    def log_table(self, key: str, *arguments: Any, **kwargs: Any) -> None:
        """Log a table, or give up."""
        self._try(super().log_table, key, *arguments, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Send a checkpoint, where that was asked for, or give up."""
        self._try(super().after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Send what has been kept for the end, or give up."""
        self._try(super().finalize, status)

    def _try(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self.lost:
            return
        try:
            work(*arguments, **options)
        except Exception as error:
            self.lost = True
            warnings.warn(
                f"Weights & Biases is lost ({first_line(error)}) and gets nothing more; the run goes on, and "
                f"everything is in {self.save_dir}.",
                stacklevel=3,
            )
