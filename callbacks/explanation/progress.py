"""Progress of explaining and scoring: a line of Lightning's bar in a terminal, else a line of text every 20 s."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress, TaskID
from tqdm import tqdm

SECONDS = 20
"""Time between two lines of text, which tell a log file enough."""


class MapProgress:
    """Counts maps, and shows the count on rank zero.

    A terminal shows it in a line of the trainer's bar, or as a bar of its own. A file or a pipe gets a line of text
    every 20 seconds: the carriage returns that redraw a bar would make one endless line of it.

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
        self._text: TextProgress | None = None

    def update(self, count: int) -> None:
        """Count maps that are done."""
        if not self._trainer.is_global_zero:
            return
        # Opened at the first count, because Lightning starts its own bar after the stage has begun.
        if self._live is None and self._bar is None and self._text is None:
            self._open()
        if self._live is not None and self._task is not None:
            # Lightning may have started another bar since, which has no such line.
            with suppress(KeyError):
                self._live.update(self._task, advance=count, refresh=True)
        elif self._bar is not None:
            self._bar.update(count)
        elif self._text is not None:
            self._text.update(count)

    def _open(self) -> None:
        bar = self._trainer.progress_bar_callback
        live = bar.progress if isinstance(bar, RichProgressBar) else None
        if live is not None and live.console.is_terminal:
            self._live, self._task = live, live.add_task("Explaining", total=self.total)
            return
        if not sys.stderr.isatty():
            self._text = TextProgress(self.total)
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
        self._live = self._bar = self._task = self._text = None


class TextProgress:
    """Counts maps and prints a line of text to stderr when `SECONDS` have passed since the last one.

    Args:
        total: number of maps.
    """

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self._start = self._printed = time.monotonic()

    def update(self, count: int) -> None:
        """Count maps that are done."""
        self.count += count
        now = time.monotonic()
        if now - self._printed >= SECONDS:
            self._printed = now
            minutes, seconds = divmod(round(now - self._start), 60)
            share = f"{100 * self.count / max(self.total, 1):.0f} %"
            line = f"explaining: {self.count} of {self.total} maps ({share}) in {minutes}:{seconds:02}"
            print(line, file=sys.stderr, flush=True)
