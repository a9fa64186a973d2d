"""Base of the callbacks that explain a classifier; all of them share one `ExplanationSession`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.checks import ConfigurationError
from callbacks.explanation.lifecycle import Schedule, StageCallback
from callbacks.explanation.session import ExplainedBatch, ExplanationSession, check_target
from labn.explainers import Explainer, explainer_by_name


class ExplainingCallback(StageCallback):
    """Explain a fixed subset of the images at validation end, and all or a subset at test end.

    All explaining callbacks of a trainer share one `ExplanationSession`, so that every map is computed once. The first
    callback with `explainers` decides what is explained; another callback must not set any of the arguments below.

    Args:
        explainers: name -> explainer; an empty value stands for the method of that name with its defaults.
        val_images: images explained at validation end while fitting, evenly spaced over the split.
        test_images: images explained at test end and by `validate`; None explains all.
        every_n_epochs: explain every n-th validation epoch while fitting; 0 never does.
        target: class explained per image: `label`, `prediction`, `top<k>` (the k-th most probable class; `top1` is the
            prediction), or one class index for all images.

    Raises:
        InputError: `target` is none of these, a number is negative, or `test_images` is 0.
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
        self.explainers = {n: explainer_by_name(n) if e is None else e for n, e in (explainers or {}).items()}
        self.own_schedule, self.target = Schedule(val_images, test_images, every_n_epochs), str(target)
        # Set by the callback with the explainers. `_leads` marks that callback: every explaining callback receives the
        # hooks, but the session must be opened and closed once.
        self._session: ExplanationSession | None = None
        self._leads = False

    @property
    def session(self) -> ExplanationSession:
        """The session that all explaining callbacks of the trainer share; available after `setup`."""
        assert self._session is not None
        return self._session

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The schedule of the callback with the explainers."""
        return self.session.schedule

    @property
    def folder(self) -> Path | None:
        """Results folder of the current stage; None before the first stage."""
        store = None if self._session is None else self._session.store
        return None if store is None else store.folder

    @property
    def engine_options(self) -> dict[str, Any]:
        """Arguments of the perturbation engine that this callback sets."""
        return {}

    @property
    def extra_explainers(self) -> dict[str, Explainer]:
        """Explainers that this callback adds; an explainer of the same name in the first callback has precedence."""
        return {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the settings; the first callback with explainers creates the session and hands it to the others.

        Raises:
            ConfigurationError: the trainer does not allow explanations, no callback or more than one has explainers, or
                this callback stands before the one with the explainers or contradicts its settings.
        """
        super().setup(trainer, pl_module, stage)
        # Tests and scripts may call `setup` of a callback that the trainer does not list.
        listed = [c for c in callbacks_of(trainer) if isinstance(c, ExplainingCallback)]
        sharing = listed if self in listed else [*listed, self]
        first = self._first_with_explainers(sharing)
        if self is first:
            session = shared_session(first, sharing)
            for callback in sharing:
                callback._session, callback._leads = session, callback is first

    def _first_with_explainers(self, sharing: list[ExplainingCallback]) -> ExplainingCallback:
        """The callback that decides what is explained; raises if this callback contradicts it."""
        mine = type(self).__name__
        first = next((callback for callback in sharing if callback.explainers), None)
        if first is None:
            raise ConfigurationError(
                f"{mine} has nothing to explain: give it explainers, or add an ExplanationCallback."
            )
        name = type(first).__name__
        if sharing.index(self) < sharing.index(first):
            raise ConfigurationError(
                f"{mine} stands before {name}, which has the explainers; list it after that one in trainer.callbacks."
            )
        if self.explainers and self is not first:
            raise ConfigurationError(f"{mine} and {name} both have explainers; give them to one of the two.")
        # A setting with its default value counts as not given.
        contradicting = {} if self is first else {n: v for n, v in self._decisions().items() if v != DECISIONS[n]}
        if contradicting:
            settings = ", ".join(f"{setting} = {value}" for setting, value in contradicting.items())
            raise ConfigurationError(
                f"{mine} has {settings}, but {name} has the explainers and decides that; set it there."
            )
        return first

    def _decisions(self) -> dict[str, Any]:
        return {**vars(self.own_schedule), "target": self.target}

    # Hooks for subclasses

    def prepare(self, trainer: pl.Trainer) -> None:
        """Called once per stage, on every rank, after the results folder has been opened."""

    def work_on(self, trainer: pl.Trainer, batch: ExplainedBatch) -> None:
        """Called per batch with explained samples; must not call collectives."""

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called once per stage, on every rank, after the last batch."""

    # The lifecycle

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Open the results folder (only the callback with the explainers), then `prepare`."""
        if self._leads:
            self.session.open(trainer, pl_module, split)
        self.prepare(trainer)

    def work(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, position: tuple[Any, ...]) -> None:
        """Pass the explained samples of a batch to `work_on`."""
        explained = self.session.batch(position, batch)
        if explained is not None:
            self.work_on(trainer, explained)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Close the session (only the callback with the explainers), then `conclude`."""
        if self._leads:
            self.session.close(trainer, pl_module)
        self.conclude(trainer, pl_module)


def shared_session(first: ExplainingCallback, sharing: list[ExplainingCallback]) -> ExplanationSession:
    """Create the session of the explaining callbacks `sharing`; `first` decides what is explained."""
    options: dict[str, Any] = {}
    extra: dict[str, Explainer] = {}
    for callback in sharing:
        options |= callback.engine_options
        extra |= callback.extra_explainers
    explainers = {**first.explainers, **{name: e for name, e in extra.items() if name not in first.explainers}}
    return ExplanationSession(explainers, first.target, options, first.own_schedule)


DECISIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(ExplainingCallback).parameters.items()
    if name != "explainers"
}
"""Settings that only the callback with the explainers may change -> their defaults."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks of a trainer, in the order in which their hooks run."""
    return trainer.callbacks  # type: ignore[attr-defined]
