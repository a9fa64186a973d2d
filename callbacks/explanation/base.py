"""The base of every callback that explains: when it works, on which samples, and with whom it shares the maps."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.checks import ConfigurationError, check_strategy
from callbacks.explanation.session import Batch, Session, check_counts, check_target, evenly_spaced
from labn.explainers import Explainer, explainer_by_name


class ExplainingCallback(pl.Callback):
    """Explain a fixed subset at validation end and the whole split (or a subset) at test end.

    Of several such callbacks in one trainer the first with `explainers` owns the session: it decides what is
    explained, and the others work on the same maps, so that an explanation is computed once. What the others say
    about it beside the defaults is refused.

    Args:
        explainers: name -> explainer; an empty value takes the method of that name with its defaults.
        val_images: images explained at validation end while fitting, evenly spaced over the split.
        test_images: images explained at test end and by `validate`; None explains all.
        every_n_epochs: explain every n-th validation epoch while fitting; 0 never does.
        target: class explained per image: `label`, `prediction`, `top<k>` (the k-th most probable one, `top1` being the
            prediction), or the index of one class for all.

    Raises:
        ValueError: a target that is none of these, a negative number, or no image at test end.
    """

    def __init__(
        self,
        explainers: dict[str, Explainer | None] | None = None,
        val_images: int = 8,
        test_images: int | None = None,
        every_n_epochs: int = 1,
        target: int | str = "label",
    ) -> None:
        check_target(target)
        check_counts(val_images=val_images, test_images=test_images, every_n_epochs=every_n_epochs)
        self.explainers = {n: explainer_by_name(n) if e is None else e for n, e in (explainers or {}).items()}
        self.val_images, self.test_images = val_images, test_images
        self.every_n_epochs, self.target = every_n_epochs, str(target)
        self._session: Session | None = None

    @property
    def folder(self) -> Path | None:
        """Results folder of the present stage; None before one has begun, and where another callback owns it."""
        return None if self._session is None else self._session.store.folder

    @property
    def engine_options(self) -> dict[str, Any]:
        """Arguments of the perturbation engine that this callback asks for."""
        return {}

    @property
    def extra_explainers(self) -> dict[str, Explainer]:
        """Explainers that this callback wants beside the owner's; the owner's win where a name is in both."""
        return {}

    # What subclasses do

    def begin(self, trainer: pl.Trainer, session: Session) -> None:
        """Called once per stage, on every rank, after the results folder is open."""

    def work(self, trainer: pl.Trainer, session: Session, batch: Batch) -> None:
        """Called per batch that holds explained samples; no collective here."""

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, session: Session) -> None:
        """Called once per stage, on every rank, after the last batch."""

    # Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse settings under which explanations would fail or be wrong."""
        loops = [trainer.validate_loop, trainer.test_loop]
        if any(loop.inference_mode for loop in loops):
            raise ConfigurationError(
                f"{type(self).__name__} needs gradients at validation and test end: "
                "set trainer.inference_mode to false."
            )
        check_strategy(type(trainer.strategy).__name__)
        owners = [c for c in callbacks_of(trainer) if isinstance(c, ExplainingCallback) and c.explainers]
        if not owners:
            raise ConfigurationError(
                f"{type(self).__name__} has nothing to explain: give it explainers, or add an ExplanationCallback."
            )
        listed = callbacks_of(trainer)
        if self in listed and listed.index(self) < listed.index(owners[0]):
            raise ConfigurationError(
                f"{type(self).__name__} stands before {type(owners[0]).__name__}, which has the explainers; "
                "list it after that one in trainer.callbacks."
            )
        if self.explainers and self is not owners[0]:
            raise ConfigurationError(
                f"{type(self).__name__} and {type(owners[0]).__name__} both have explainers; "
                "give them to one of the two."
            )
        self._check_decided(owners[0])

    def _check_decided(self, owner: ExplainingCallback) -> None:
        """Stop where this callback says what is explained, which only the owner of the session decides."""
        said = {} if self is owner else {n: value for n, value in DECIDED.items() if getattr(self, n) != value}
        if said:
            mine = ", ".join(f"{name} = {getattr(self, name)}" for name in said)
            raise ConfigurationError(
                f"{type(self).__name__} has {mine}, but {type(owner).__name__} has the explainers and decides that; "
                "set it there."
            )

    def _owner(self, trainer: pl.Trainer) -> ExplainingCallback:
        return next(c for c in callbacks_of(trainer) if isinstance(c, ExplainingCallback) and c.explainers)

    def _active(self, trainer: pl.Trainer) -> bool:
        owner = self._owner(trainer)
        if trainer.sanity_checking:
            return False
        if not trainer.training and not trainer.validating:
            return True
        return trainer.state.fn != "fit" or (
            self._ever_active(trainer) and (trainer.current_epoch + 1) % owner.every_n_epochs == 0
        )

    def _ever_active(self, trainer: pl.Trainer) -> bool:
        """Whether the running command explains anything at all, as a fit may not."""
        owner = self._owner(trainer)
        return trainer.state.fn != "fit" or min(owner.every_n_epochs, owner.val_images, trainer.limit_val_batches) > 0

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> Session:
        owner = self._owner(trainer)
        if owner is self:
            callbacks = [c for c in callbacks_of(trainer) if isinstance(c, ExplainingCallback)]
            options: dict[str, Any] = {}
            extra: dict[str, Explainer] = {}
            for callback in callbacks:
                options |= callback.engine_options
                extra |= callback.extra_explainers
            extra = {name: explainer for name, explainer in extra.items() if name not in self.explainers}
            self._session = Session({**self.explainers, **extra}, self.target, options)
            size = len(trainer.datamodule.labels(split))  # type: ignore[attr-defined]
            count = self.val_images if trainer.state.fn == "fit" else self.test_images
            self._session.open(trainer, pl_module, split, evenly_spaced(size, count))
        assert owner._session is not None
        return owner._session

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if self._active(trainer):
            self.begin(trainer, self._open(trainer, pl_module, split))

    def _batch(self, trainer: pl.Trainer, raw: dict[str, Tensor], position: tuple[Any, ...]) -> None:
        if self._active(trainer):
            session = self._owner(trainer)._session
            assert session is not None
            batch = session.batch(position, raw)
            if batch is not None:
                self.work(trainer, session, batch)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active(trainer):
            session = self._owner(trainer)._session
            assert session is not None
            if session is self._session:
                self._warn_unreached(trainer, pl_module, session)
            self.finish(trainer, pl_module, session)

    def _warn_unreached(self, trainer: pl.Trainer, pl_module: pl.LightningModule, session: Session) -> None:
        """Say it where the loop has ended before all chosen images; a collective."""
        count, chosen = torch.tensor(float(len(session.reached)), device=pl_module.device), len(session.subset or ())
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        if total < chosen:
            rank_zero_warn(
                f"{session.store.folder}: {total} of the {chosen} images chosen to be explained were reached; "
                f"trainer.limit_{session.split}_batches (or overfit_batches, fast_dev_run) ends before the others."
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the results folder of this validation epoch."""
        self._start(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the results folder of the test."""
        self._start(trainer, pl_module, "test")

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
        self._batch(trainer, batch, ("val", trainer.current_epoch, dataloader_idx, batch_idx))

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
        self._batch(trainer, batch, ("test", 0, dataloader_idx, batch_idx))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish this validation epoch."""
        self._end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the test."""
        self._end(trainer, pl_module)


DECIDED = {
    name: parameter.default
    for name, parameter in inspect.signature(ExplainingCallback).parameters.items()
    if name != "explainers"
}
"""What the owner of a session decides -> default."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks of a trainer, in the order in which their hooks run."""
    return trainer.callbacks  # type: ignore[attr-defined]
