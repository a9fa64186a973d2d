"""What a command shows in the terminal beside its tables."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from callbacks.explanation.base import ExplainingCallback, callbacks_of
from callbacks.explanation.detections import DetectionCallback
from labn.launch.error_messages import config_sentence


class SentenceParser(LightningArgumentParser):
    """Ends with one sentence about the mistake, instead of the usage of every option of a trainer."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with status 2, or raise where the caller wants that."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sentence = config_sentence(message, [action.dest for action in parser._actions])
        if "arguments are required" in message:
            sentence = f"{sentence.rstrip('.')}; name a configuration, as in --config configs/quickstart.yaml."
        program = parser.prog.replace(" [options]", "")
        self.exit(2, f"{program}: {sentence} (`{program} --help` lists all options)\n")


def say_figures(trainer: pl.Trainer, stage: str) -> None:
    """Print what the model was measured to be, such as its accuracy, and where the report is; rank zero alone does.

    The counts of the confusion matrix, K^2 of them, are left to the logs.
    """
    shown = [c for c in callbacks_of(trainer) if isinstance(c, ExplainingCallback)]
    methods = {name for callback in shown for name in (*callback.explainers, *callback.extra_explainers)}
    # A method's name may hold a slash, so that a key is not taken apart.
    of_maps = tuple(f"{stage}/{name}/" for name in (*methods, "confusion"))
    of_model = [key for key in trainer.callback_metrics if key.startswith(f"{stage}/") and not key.startswith(of_maps)]
    figures = {key.removeprefix(f"{stage}/"): float(trainer.callback_metrics[key]) for key in of_model}
    if not trainer.is_global_zero:
        return
    print(f"\n{stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    writers = [c for c in callbacks_of(trainer) if isinstance(c, (ExplainingCallback, DetectionCallback))]
    for folder in dict.fromkeys(callback.folder for callback in writers):
        if folder is not None and (folder / "report.html").is_file():
            print(f"Report: {folder / 'report.html'}")


def say_taken_over(path: str, asked: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Name the settings of a model that a checkpoint's own replace; nothing is said where both agree.

    Args:
        path: the checkpoint.
        asked: what the configuration itself says about the `model`, without defaults and what is linked to the data.
        built: `model` with the checkpoint's settings in place.
    """
    mine, theirs = (dict((model.get("init_args") or {}).items()) for model in (asked, built))
    other = [f"{k} {theirs[k]} (not {mine[k]})" for k in mine if k in theirs and str(mine[k]) != str(theirs[k])]
    if other:
        rank_zero_info(f"The model is built with the settings that {path} was trained with: {', '.join(other)}.")


def no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's is about the run, and not about another product of its makers."""
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
