"""The command line: `python cli.py {fit,validate,test} --config configs/<experiment>.yaml`, and COMMANDS."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from labn.errors import InputError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("LABN_DATA", "../shared/data")

import lightning.pytorch as pl
import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import callbacks
import datamodules
import labn.explainers
import labn.modules
from callbacks.checkpoint import (
    BEST,
    LAST,
    RunCheckpointIO,
    check_monitors,
    find_checkpoint,
    has_last,
    named_classes,
    resolved,
)
from callbacks.checks import check_strategy
from callbacks.logging.loggers import default_loggers, unused_version
from callbacks.logging.run_config import RunConfigCallback
from callbacks.logging.terminal import SentenceParser, no_advertisement, say_figures, say_taken_over
from labn.commands import coarse, compare, doctor, explain, shards, sweep, table
from labn.errors import sentence_of
from labn.io.atomic import check_writable
from labn.launch import archive_fit as earlier_fit
from labn.launch.allocator import keep_freed_memory
from labn.launch.config_include import configurations, expand_includes, experiment_name
from labn.launch.error_messages import explain_error
from labn.launch.slurm import requeue_on_signal, restarted
from labn.models.checkpoints import own_dataclasses, read_checkpoint
from labn.modules.plain_checkpoints import check_own_classes, check_same_class
from labn.modules.restore import WEIGHT_ARGUMENTS

__all__ = ["LabnCLI", "callbacks", "datamodules", "labn", "main"]

CHECKPOINTS = (BEST, LAST)


class LabnCLI(LightningCLI):
    """LightningCLI with one run folder per experiment, and checkpoints found by `best` and `last`.

    Args:
        experiment: name of the run folder in `runs/`, unless `--run_dir` names one.
        kwargs: arguments of `LightningCLI`.
    """

    def __init__(self, *args: Any, experiment: str, **kwargs: Any) -> None:
        self.experiment = experiment
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without `predict`: what a model predicts is in `predictions.csv` of a test.

        Nor is there a `weights_only`: checkpoints are always read as plain data, see `PlainCheckpointIO`; nor a
        `verbose`: `say_figures` prints what the tables of the maps leave out.
        """
        known = LightningCLI.subcommands()
        return {name: {*skipped, "weights_only", "verbose"} for name, skipped in known.items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this project's own arguments and tie the number of classes to the data."""
        parser.add_argument(
            "--include", type=list[str], default=[], help="In a file: configurations that are read before this one."
        )
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of checkpoints, logs and results; default runs/<name of the first --config>.",
        )
        parser.add_argument(
            "--imports", type=list[str], default=[], help="Modules of your own to import first, such as a new metric."
        )
        parser.add_argument(
            "--wandb", type=str, default="offline", help="Weights & Biases: offline, online or disabled."
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's, which keeps what was given."""
        self._given = args
        super().parse_arguments(parser, args)

    def _said_of_the_model(self) -> Any:
        """`model` as files and words have it: without defaults, and without what is linked to the data."""
        said: Any = self.parser.parse_args(self._given, defaults=False)
        return said[self.subcommand].get("model") or {}

    def _settle(self) -> None:
        """Settle the run folder and the checkpoint before anything is built."""
        self.subcommand = self.config["subcommand"]
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir or Path("runs") / self.experiment)
        config.run_dir = str(run_dir)
        for name in config.imports:
            importlib.import_module(name)
        elsewhere = config.trainer.default_root_dir
        if elsewhere is not None and Path(elsewhere).resolve() != run_dir.resolve():
            rank_zero_warn(f"trainer.default_root_dir {elsewhere} is not used: a run goes to --run_dir ({run_dir}).")
        config.trainer.default_root_dir = str(run_dir)
        # Before the trainer is built, which would first ask for a GPU or a package that such a strategy needs.
        strategy = config.trainer.strategy
        check_strategy(strategy if isinstance(strategy, str) else strategy.class_path)
        if not config.trainer.get("fast_dev_run"):
            check_writable(run_dir, "--run_dir")
        if self.subcommand == "fit" and config.get("ckpt_path") is None and restarted() and has_last(run_dir):
            config.ckpt_path = LAST
            rank_zero_info(f"SLURM has queued this job again: fit goes on from the last checkpoint in {run_dir}.")
        if config.get("ckpt_path") in CHECKPOINTS:
            config.ckpt_path = find_checkpoint(run_dir, config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, with loggers that write to the run folder unless the configuration names its own."""
        config = self.config[self.subcommand]
        if config.trainer.get("logger") in (None, True) and not config.trainer.get("fast_dev_run"):
            run_dir, command = Path(config.run_dir), str(self.subcommand)
            version = command if self._begins() else unused_version(run_dir / "logs", command)
            kwargs["logger"] = default_loggers(run_dir, config.wandb, version)
        given = self.config_init[self.subcommand].trainer.get("plugins") or []
        checkpoints = RunCheckpointIO([config.run_dir])
        kwargs["plugins"] = [checkpoints, *(given if isinstance(given, list) else [given])]
        trainer = super().instantiate_trainer(**kwargs)
        # Folders that the configuration itself gives to checkpoint callbacks; no state has been loaded yet.
        checkpoints.folders |= {resolved(c.dirpath) for c in trainer.checkpoint_callbacks if c.dirpath}
        return trainer

    def before_fit(self) -> None:
        """Keep an earlier fit apart from one that begins; by now the ranks are known, and nobody has opened a file."""
        check_monitors(self.trainer)
        aside = None
        if self._begins() and self.trainer.is_global_zero:
            aside = earlier_fit.archive_fit(Path(self.config[self.subcommand].run_dir))
        if aside is not None:
            last = aside / "checkpoints" / f"{LAST}.ckpt"
            hint = f"; to go on from it: --ckpt_path {last}" if last.is_file() else ""
            rank_zero_info(f"This fit begins anew: what an earlier one left here is in {aside} now{hint}.")

    def after_validate(self) -> None:
        """Print the figures of the model."""
        say_figures(self.trainer, "val")

    def after_test(self) -> None:
        """Print the figures of the model."""
        say_figures(self.trainer, "test")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **quiet}

    def _parse_ckpt_path(self) -> None:
        """Let Lightning take a checkpoint's hyper-parameters over, once they are seen to name no foreign class.

        `best` and `last` are found first, so that they are tested as the same network as the file that they name.
        """
        self._settle()
        config = self.config[self.subcommand]
        path = config.get("ckpt_path")
        if not path or not Path(path).is_file():
            return
        content = read_checkpoint(path)
        asked = config.get("model") or {}
        check_own_classes(path, content, named_classes(asked))
        check_same_class(path, content, asked.get("class_path"))
        with torch.serialization.safe_globals(own_dataclasses(Path(path))):
            super()._parse_ckpt_path()
        built: Any = self.config[self.subcommand].get("model") or {}
        say_taken_over(path, self._said_of_the_model(), built)
        arguments = built.get("init_args") or {}
        for name in WEIGHT_ARGUMENTS:
            if arguments.get(name) and not Path(os.path.expandvars(arguments[name])).is_file():
                arguments[name] = None  # the checkpoint has every weight

    def _begins(self) -> bool:
        """Whether this is a fit that goes on from no checkpoint, and leaves files."""
        config = self.config[self.subcommand]
        return self.subcommand == "fit" and not config.get("ckpt_path") and not config.trainer.get("fast_dev_run")


COMMANDS: dict[str, ModuleType] = {
    "compare": compare,
    "doctor": doctor,
    "explain": explain,
    "shards": shards,
    "sweep": sweep,
    "table": table,
    "coarse": coarse,
}
"""Commands without a trainer: modules with `SUMMARY`, `DETAILS`, `add_arguments(parser)` and `run(options)`."""


DESCRIPTION = "Train image classifiers, explain their predictions with maps, and measure how good the maps are."
EPILOG = "\n".join(
    [
        "commands without a trainer:",
        *(f"    {name:<20}{module.SUMMARY}" for name, module in COMMANDS.items()),
        "",
        "python cli.py fit --config configs/quickstart.yaml",
        "python cli.py test --config configs/quickstart.yaml --ckpt_path best",
    ]
)


class MainHelp(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the list of commands."""


def run_command(name: str, argv: Sequence[str]) -> None:
    """Run one of `COMMANDS`; bad input ends with one sentence and exit status 2."""
    module = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"cli.py {name}",
        description=module.SUMMARY,
        epilog=module.DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    try:
        module.run(options)
    except Exception as error:
        sentence = str(error) if isinstance(error, OSError) else sentence_of(error)
        if sentence is None:
            raise
        parser.exit(2, f"{parser.prog}: {sentence}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line on `argv`, the process's own arguments by default."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        run_command(given[0], given[1:])
        return
    words = expand_includes(given)
    known = [*LabnCLI.subcommands(), *COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in known:
        near = difflib.get_close_matches(words[0], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"there is no command {words[0]!r}; {hint}The commands are {', '.join(known)}.")
    requeue_on_signal()
    try:
        train_or_evaluate(words, experiment_name(configurations(given)))
    except SIGTERMException as error:
        # Lightning's own exit status would say that all went well.
        print("Terminated; the same command (fit: with --ckpt_path last) goes on from here.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from error
    except RuntimeError as error:
        better = explain_error(error, getattr(rank_zero_only, "rank", 0))
        if better is None:
            raise
        raise better from error


def train_or_evaluate(words: list[str], experiment: str) -> None:
    """Run a command that has a trainer.

    Args:
        words: arguments with the included configurations in place.
        experiment: default name of the run folder.
    """
    # sys.argv stays as it is: the launcher of further ranks starts them with it, and they expand it themselves.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # Between Lightning and torch; nobody who runs a command can do anything about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # Means of maps' scores are those of all ranks already; a module's own figures (`val/loss`) still warn.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('(val|test)/[^']+/")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    keep_freed_memory()
    LabnCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=42,
        trainer_defaults={"inference_mode": False, "use_distributed_sampler": False},
        save_config_callback=RunConfigCallback,
        parser_class=SentenceParser,
        parser_kwargs={"description": DESCRIPTION, "epilog": EPILOG, "formatter_class": MainHelp},
        # Included files are read by now, and their paths mean nothing in a configuration that is printed or kept.
        args=[*words, "--include=[]"] if "--config" in words or "-c" in words else words,
        auto_configure_optimizers=False,
        experiment=experiment,
    )


def console() -> None:
    """`main` for a terminal: an error that is meant for the user ends with its sentence and status 1.

    What nobody foresaw keeps its traceback, and everything has one with `LABN_TRACEBACK=1` in the environment.
    """
    try:
        main()
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or os.environ.get("LABN_TRACEBACK", "0") != "0":
            raise
        print(f"cli.py: {sentence}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    console()
