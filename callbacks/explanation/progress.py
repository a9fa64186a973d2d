"""Progress of explaining and scoring: a line of Lightning's bar in a terminal, else a line of text every 20 s."""

from __future__ import annotations

import sys
from contextlib import suppress

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress, TaskID
from tqdm import tqdm

SECONDS = 20
"""Time between two lines of text, which tell a log file enough."""


class MapProgress:
    """Counts maps, and shows the count on rank zero.

    Args:
        trainer: the trainer, whose progress bar shows the count where it runs in a terminal.
        total: number of maps.
    """

    def __init__(self, trainer: pl.Trainer, total: int) -> None:
        self.total = total
        self._trainer = trainer
        self._live: Progress | None = None
        self._bar: tqdm | None = None
        self._task: TaskID | None = None

    def update(self, count: int) -> None:
        """Count maps that are done."""
        if not self._trainer.is_global_zero:
            return
        # Opened at the first count, because Lightning starts its own bar after the stage has begun.
        if self._live is None and self._bar is None:
            self._open()
        if self._live is not None and self._task is not None:
            # Lightning may have started another bar since, which has no such line.
            with suppress(KeyError):
                self._live.update(self._task, advance=count, refresh=True)
        elif self._bar is not None:
            self._bar.update(count)

    def _open(self) -> None:
        bar = self._trainer.progress_bar_callback
        live = bar.progress if isinstance(bar, RichProgressBar) else None
        if live is not None and live.console.is_terminal:
            self._live, self._task = live, live.add_task("Explaining", total=self.total)
            return
        self._bar = tqdm(
            total=self.total,
            desc="explaining",
            unit="map",
            file=sys.stderr,
            mininterval=SECONDS,
            delay=SECONDS,
            leave=False,
        )

    def close(self) -> None:
        """Remove the line."""
        if self._live is not None and self._task is not None:
            with suppress(KeyError):
                self._live.remove_task(self._task)
        if self._bar is not None:
            self._bar.close()
        self._live = self._bar = self._task = None
