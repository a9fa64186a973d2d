"""Output of a command in the terminal besides its tables: usage errors, metrics and restored settings of the model."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn, ProgressColumn
from rich.table import Column

from callbacks.explanation.base import ExplainingCallback, callbacks_of
from callbacks.explanation.detections import DetectionCallback
from callbacks.logging.trackers import trackers_of
from labn.errors import printable
from labn.launch.error_messages import config_sentence
from labn.report.caveats import chance_caveat


class SentenceParser(LightningArgumentParser):
    """A parser that reports a wrong argument in one sentence instead of printing the usage of all trainer options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2, or raise if the parser was built with `exit_on_error=False`."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sentence = config_sentence(message, [action.dest for action in parser._actions])
        if "arguments are required" in message:
            sentence = f"{sentence.rstrip('.')}; name a configuration, as in --config configs/quickstart.yaml."
        program = parser.prog.replace(" [options]", "")
        self.exit(2, f"{program}: {printable(sentence)} (`{program} --help` lists all options)\n")


class RunProgressBar(RichProgressBar):
    """Lightning's progress bar in one line: without the version of the logger, and cut where the terminal ends.

    Metrics that are wrapped leave copies of the bar behind when their number of lines changes.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar."""
        super().on_train_start(trainer, pl_module)
        if self.progress is None:
            return
        for column in self.progress.columns:
            if isinstance(column, ProgressColumn) and not isinstance(column, BarColumn):  # the bar alone gives way
                width = max(20, self.progress.console.width - 75) if column is self._metric_component else None
                column._table_column = Column(no_wrap=True, overflow="ellipsis", max_width=width)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The metrics of the model that are logged with `prog_bar=True`."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


def with_progress_bar(callbacks: pl.Callback | Sequence[pl.Callback], is_shown: bool) -> list[pl.Callback]:
    """The callbacks of a configuration and, unless they hold one or none is shown, the progress bar."""
    own = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
    needed = is_shown and not any(isinstance(callback, ProgressBar) for callback in own)
    return [*own, RunProgressBar()] if needed else own


def say_figures(trainer: pl.Trainer, stage: str) -> None:
    """Print the metrics of the model, such as its accuracy, and the path of the report; only on rank zero.

    The K^2 counts of the confusion matrix are in the logs only.
    """
    explaining = [c for c in callbacks_of(trainer) if isinstance(c, ExplainingCallback)]
    methods = {name for callback in explaining for name in (*callback.explainers, *callback.extra_explainers)}
    # The name of a method may contain a slash, so that keys are compared by prefix and not split.
    of_maps = tuple(f"{stage}/{name}/" for name in (*methods, "confusion"))
    of_model = [key for key in trainer.callback_metrics if key.startswith(f"{stage}/") and not key.startswith(of_maps)]
    # Before the check of the rank: reading callback_metrics may synchronise the ranks.
    figures = {key.removeprefix(f"{stage}/"): float(trainer.callback_metrics[key]) for key in of_model}
    if not trainer.is_global_zero:
        return
    print(f"\n{stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    say_chance(trainer, stage, figures.get("accuracy"))
    writers = [c for c in callbacks_of(trainer) if isinstance(c, (ExplainingCallback, DetectionCallback))]
    say_trackers(trainer)
    for folder in dict.fromkeys(callback.folder for callback in writers):
        if folder is not None and (folder / "report.html").is_file():
            print(printable(f"Report: {folder / 'report.html'}"))


def say_chance(trainer: pl.Trainer, stage: str, accuracy: float | None) -> None:
    """Print that the stage's accuracy is not clearly above the share of the most frequent class, if so."""
    data = getattr(trainer, "datamodule", None)
    if accuracy is not None and data is not None and hasattr(data, "labels"):
        caveat = chance_caveat(accuracy, data.labels(stage).tolist())
        if caveat:
            print(caveat)


def say_taken_over(path: str, asked: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Print the settings of the model that those of a checkpoint replace; print nothing if both agree.

    Args:
        path: the checkpoint.
        asked: section `model` of the configuration, without defaults and without values linked to the data.
        built: section `model` with the settings of the checkpoint.
    """
    configured, restored = (dict((model.get("init_args") or {}).items()) for model in (asked, built))
    changed = [
        f"{name} {restored[name]} (not {value})"
        for name, value in configured.items()
        if name in restored and str(value) != str(restored[name])
    ]
    if changed:
        rank_zero_info(f"The model is built with the settings that {path} was trained with: {', '.join(changed)}.")


def escape_controls(record: logging.LogRecord) -> bool:
    """Filter for log records that changes the message: names with control characters are escaped; always True."""
    record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
    return True


NOISE = re.compile(
    r"litlogger|litmodels|[THI]PU available|GPU available: False|Restoring states from the checkpoint|^Seed set to"
    r"|^`Trainer.fit` stopped: `max_epochs="
)
"""Lightning's messages that tell nothing: advertisements, missing devices, and what this project's own lines say."""


def no_noise(record: logging.LogRecord) -> bool:
    """Filter for log records: False for `NOISE`."""
    return NOISE.search(record.getMessage()) is None


def say_fitted(trainer: pl.Trainer, words: Sequence[str]) -> None:
    """Print the best checkpoint, its monitored value, and the command that tests it; only on rank zero.

    Args:
        trainer: the trainer after `fit`.
        words: the arguments of the command line, with `fit` among them.
    """
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
    # Without a monitor, Lightning calls the last checkpoint the best one.
    best = next((c for c in saved if c.monitor is not None), None)
    # Before the check of the rank: reading callback_metrics may synchronise the ranks.
    accuracy = trainer.callback_metrics.get("val/accuracy")
    if not trainer.is_global_zero or best is None:
        return
    score = "" if best.best_model_score is None else f" ({best.monitor} {float(best.best_model_score):.4g})"
    print()
    path, here = Path(best.best_model_path), Path.cwd()
    print(printable(f"Best checkpoint: {path.relative_to(here) if path.is_relative_to(here) else path}{score}"))
    say_chance(trainer, "val", None if accuracy is None else float(accuracy))
    say_trackers(trainer)
    print(printable(f"Next: python cli.py {shlex.join(tested(words))}"))


def say_trackers(trainer: pl.Trainer) -> None:
    """Print where the trackers have their results, and the command that shows or uploads them."""
    for tracker in trackers_of(trainer.loggers):
        # A service that has gone is no reason for a finished run to end with an error.
        with suppress(Exception):
            if where := tracker.where():
                print(printable(f"{tracker.name}: {where}"))


def tested(words: Sequence[str]) -> list[str]:
    """The arguments of the test that follows a fit.

    Example:
        >>> tested(["fit", "--config", "a.yaml", "--ckpt_path=last", "--run_dir", "fit"])
        ['test', '--config', 'a.yaml', '--run_dir', 'fit', '--ckpt_path', 'best']
    """
    # Only the command: the name of a run folder may be `fit` too.
    command = words.index("fit") if "fit" in words else None
    kept, skip = [], False
    for position, word in enumerate(words):
        if not skip and not word.startswith("--ckpt_path"):
            kept.append("test" if position == command else word)
        skip = word == "--ckpt_path"
    return [*kept, "--ckpt_path", "best"]
