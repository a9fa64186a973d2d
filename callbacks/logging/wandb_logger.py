"""A Weights & Biases logger whose failures do not stop the run."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from labn.errors import without_credentials
from labn.io.readers import first_line


class RunWandbLogger(WandbLogger):
    """Lightning's `WandbLogger` that warns once and stops logging when Weights & Biases fails during a run.

    All results are in the run folder as well. After a failure no further call is made, because each may wait for a
    service that does not answer.
    """

    lost = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Lightning passes this setting to `wandb.init` also where nobody has set it, and the package warns about it.
        if kwargs.get("anonymous") is None:
            getattr(self, "_wandb_init", {}).pop("anonymous", None)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers; see the class for failures."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyper-parameters; see the class for failures."""
        self._try(super().log_hyperparams, params)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures; see the class for failures."""
        self._try(super().log_image, key, images, step, **kwargs)

    def log_table(self, key: str, *arguments: Any, **kwargs: Any) -> None:
        """Log a table; see the class for failures."""
        self._try(super().log_table, key, *arguments, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload a checkpoint if `log_model` is set; see the class for failures."""
        self._try(super().after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Upload what is logged at the end of a run; see the class for failures."""
        self._try(super().finalize, status)

    def _try(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self.lost:
            return
        try:
            work(*arguments, **options)
        except Exception as error:
            self.lost = True
            reason = without_credentials(first_line(error))
            warnings.warn(
                f"Weights & Biases has failed ({reason}) and receives nothing more; the run continues, and "
                f"all results are in {self.save_dir}.",
                stacklevel=3,
            )
