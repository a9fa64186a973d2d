"""The command line: `python cli.py {fit,validate,test} --config configs/<experiment>.yaml`, and COMMANDS."""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from labn.errors import InputError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("LABN_DATA", "../shared/data")

import lightning.pytorch as pl
import numpy as np
import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
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
)
from callbacks.checks import check_strategy
from callbacks.logging.run_config import RunConfigCallback
from callbacks.logging.terminal import SentenceParser, no_advertisement, say_figures, say_taken_over
from callbacks.logging.wandb_logger import RunWandbLogger, first_line
from datamodules.io.solar_frames import PictureSource, Preparation
from datamodules.io.sources import FileSource, Record
from datamodules.io.tar_files import write_shards
from labn.commands import coarse, compare, doctor, explain, shards, sweep, table
from labn.errors import sentence_of
from labn.io.atomic import check_writable
from labn.io.images import image_files
from labn.io.preprocessing import Preprocessing
from labn.io.readers import read_yaml
from labn.launch import archive_fit as earlier_fit
from labn.launch.allocator import keep_freed_memory
from labn.launch.config_include import expand_parts, with_parts
from labn.launch.error_messages import config_sentence, explained
from labn.launch.slurm import requeue_on_signal, restarted
from labn.models.checkpoints import own_data, read_checkpoint
from labn.modules.plain_checkpoints import check_own_classes, check_same_class
from labn.modules.restore import START_WEIGHTS

__all__ = ["LabnCLI", "callbacks", "datamodules", "labn", "main"]

CHECKPOINTS = (BEST, LAST)


class LabnCLI(LightningCLI):
    """LightningCLI with one run folder per configuration, and checkpoints found by `best` and `last`."""

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
        parser.add_argument("--parts", type=list[str], default=[], help="Configuration files read before this one.")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of checkpoints, logs and results; default runs/<last configuration outside parts/>.",
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
        run_dir = Path(config.run_dir or Path("runs") / self._experiment())
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
        kwargs["plugins"] = [RunCheckpointIO(), *(given if isinstance(given, list) else [given])]
        return super().instantiate_trainer(**kwargs)

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
        with torch.serialization.safe_globals(own_data(Path(path))):
            super()._parse_ckpt_path()
        built: Any = self.config[self.subcommand].get("model") or {}
        say_taken_over(path, self._said_of_the_model(), built)
        arguments = built.get("init_args") or {}
        for name in START_WEIGHTS:
            if arguments.get(name) and not Path(os.path.expandvars(arguments[name])).is_file():
                arguments[name] = None  # the checkpoint has every weight

    def _begins(self) -> bool:
        """Whether this is a fit that goes on from no checkpoint, and leaves files."""
        config = self.config[self.subcommand]
        return self.subcommand == "fit" and not config.get("ckpt_path") and not config.trainer.get("fast_dev_run")

    def _experiment(self) -> str:
        files = [Path(str(file)) for file in self.config[self.subcommand].get("config") or []]
        experiments = [file for file in files if file.parent.name != "parts"]
        return experiments[-1].stem if experiments else "default"


def unused_version(folder: Path, command: str) -> str:
    """`fit`, `fit-1`, ...: the first that no earlier run has filled, because Lightning would empty it."""
    names = itertools.chain([command], (f"{command}-{n}" for n in itertools.count(1)))
    return next(name for name in names if not (folder / name / "metrics.csv").exists())


def default_loggers(run_dir: Path, wandb_mode: str, version: str) -> list[Logger]:
    """A CSV logger to `logs/<version>` and, unless disabled or not installed, a Weights & Biases logger.

    Raises:
        ValueError: `wandb_mode` is none of offline, online and disabled.
    """
    if wandb_mode not in ("offline", "online", "disabled"):
        raise InputError(f"--wandb is {wandb_mode!r}; it must be offline, online or disabled.")
    run_dir.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [callbacks.RunLogger(save_dir=run_dir, name="logs", version=version)]
    wandb = None if wandb_mode == "disabled" else wandb_logger(run_dir, wandb_mode)
    return loggers if wandb is None else [*loggers, wandb]


def wandb_logger(run_dir: Path, mode: str) -> Logger | None:
    """A Weights & Biases logger; `online` falls back to an offline run, which `wandb sync` can send later.

    None, with a warning, where there is no working package: everything is in the run folder all the same.
    """
    # Pictures of tables wait there for `wandb sync`; the default is a folder of the user's, apart from the run.
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").absolute()))
    for offline in (True,) if mode == "offline" else (False, True):
        try:
            logger = RunWandbLogger(project="labn", name=run_dir.name, save_dir=run_dir, offline=offline)
            _ = logger.experiment
            return logger
        except Exception as error:
            instead = "everything is" if offline else "logging offline, everything is"
            warnings.warn(
                f"Weights & Biases is not available ({first_line(error)}); {instead} in {run_dir}.", stacklevel=2
            )
    return None


def read_picture(path: Path, wanted: Preprocessing) -> np.ndarray:
    """A picture file as (size, size, C) uint8, prepared as the data modules do.

    Raises:
        BadImageError: the file cannot be decoded.
    """
    record = Record(path.name, 0, path)
    if wanted.fits_range is not None:
        preparation = Preparation(wanted.image_size, wanted.caption, wanted.fits_range)
        return PictureSource([record], np.zeros(1, dtype=np.int64), preparation).load(0)[0]
    source = FileSource([record], wanted.image_size, wanted.crop, wanted.channels, shorter=wanted.shorter)
    return source.load(0)[0]


def data_of(paths: Sequence[Path]) -> pl.LightningDataModule:
    """The data module of configurations, of which later ones win, as in the other commands.

    Raises:
        ValueError: they name none, or with arguments that it does not have.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    config = None
    for file in (part for path in paths for part in with_parts(path)):
        content = read_yaml(file)
        if isinstance(content, dict) and "data" in content:
            try:
                config = parser.parse_object({"data": content["data"]}, config)
            except argparse.ArgumentError as error:
                raise InputError(f"{file}: {config_sentence(str(error))}") from error
    if config is None:
        raise InputError(f"--config {' '.join(map(str, paths))} names no data module under `data:`.")
    return parser.instantiate_classes(config).data


COMMANDS: dict[str, tuple[ModuleType, Callable[[argparse.Namespace], None]]] = {
    "compare": (compare, compare.run),
    "doctor": (doctor, doctor.run),
    "explain": (explain, lambda options: explain.run(options, read_picture, image_files)),
    "shards": (shards, lambda options: shards.run(options, data_of, write_shards)),
    "sweep": (sweep, sweep.run),
    "table": (table, table.run),
    "coarse": (coarse, coarse.run),
}
"""Commands without a trainer: what declares their arguments, and what runs them."""


DESCRIPTION = "Train image classifiers, explain their predictions with maps, and measure how good the maps are."
EPILOG = "\n".join(
    [
        "commands without a trainer:",
        *(f"    {name:<20}{module.SUMMARY}" for name, (module, _) in COMMANDS.items()),
        "",
        "python cli.py fit --config configs/quickstart.yaml",
        "python cli.py test --config configs/quickstart.yaml --ckpt_path best",
    ]
)


class MainHelp(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the list of commands."""


def run_command(name: str, argv: Sequence[str]) -> None:
    """Run one of `COMMANDS`; bad input ends with one sentence and exit status 2."""
    module, work = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"cli.py {name}",
        description=module.SUMMARY,
        epilog=module.DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    try:
        work(options)
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
    words = expand_parts(given)
    known = [*LabnCLI.subcommands(), *COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in known:
        near = difflib.get_close_matches(words[0], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"there is no command {words[0]!r}; {hint}The commands are {', '.join(known)}.")
    requeue_on_signal()
    try:
        train_or_evaluate(words)
    except SIGTERMException as error:
        # Lightning's own exit status would say that all went well.
        print("Terminated; the same command (fit: with --ckpt_path last) goes on from here.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from error
    except RuntimeError as error:
        better = explained(error, getattr(rank_zero_only, "rank", 0))
        if better is None:
            raise
        raise better from error


def train_or_evaluate(words: list[str]) -> None:
    """Run a command that has a trainer."""
    # sys.argv stays as it is: the launcher of further ranks starts them with it, and they expand their own parts.
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
        # The parts are read by now, and their paths mean nothing in a configuration that is printed or kept.
        args=[*words, "--parts=[]"] if "--config" in words or "-c" in words else words,
        auto_configure_optimizers=False,
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
