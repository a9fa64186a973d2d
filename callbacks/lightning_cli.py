"""`fit`, `validate` and `test`: LightningCLI with one run folder per experiment."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
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
from callbacks.explanation.base import callbacks_of
from callbacks.logging.loggers import check_packages, default_loggers, unused_version, with_run_log
from callbacks.logging.run_config import RunConfigCallback
from callbacks.logging.terminal import (
    SentenceParser,
    escape_controls,
    no_noise,
    say_figures,
    say_fitted,
    say_taken_over,
    with_progress_bar,
)
from labn.errors import InputError, UserError
from labn.io.atomic import check_writable
from labn.launch.allocator import keep_freed_memory
from labn.launch.archive_fit import archive_fit
from labn.launch.config_include import configurations, expand_includes, experiment_name
from labn.launch.error_messages import explain_error, restore_error
from labn.launch.run_lock import clean_run_folder, locked
from labn.launch.slurm import is_first_process, requeue_on_signal, restarted
from labn.models.checkpoints import own_dataclasses, read_checkpoint
from labn.modules.plain_checkpoints import check_own_classes, check_same_class
from labn.modules.restore import WEIGHT_ARGUMENTS

# The packages are imported so that jsonargparse lists their classes in `--help` and resolves short class names.
__all__ = ["LabnCLI", "callbacks", "datamodules", "labn", "train_or_evaluate"]

DESCRIPTION = "Train image classifiers, explain their predictions with maps, and measure how good the maps are."
CHECKPOINTS = (BEST, LAST)


class LabnCLI(LightningCLI):
    """LightningCLI with one run folder per experiment and the checkpoint names `best` and `last`.

    Args:
        args: positional arguments of `LightningCLI`.
        experiment: name of the run folder in `runs/`; `--run_dir` overrides it.
        words: the arguments as the user has given them.
        held: receives the lock of the run folder, which its owner holds until the command has ended.
        kwargs: arguments of `LightningCLI`.
    """

    def __init__(self, *args: Any, experiment: str, words: Sequence[str], held: ExitStack, **kwargs: Any) -> None:
        self.experiment, self.words = experiment, words
        self.held = held
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes without the lock, which stays with the process that launches others (`ddp_spawn`)."""
        return {**self.__dict__, "held": None}

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands except `predict`, with the arguments that each of them does not show.

        `predict` is left out because `test` writes `predictions.csv`, the argument `weights_only` because checkpoints
        are always read as plain data (`PlainCheckpointIO`), and `verbose` because `say_figures` prints the metrics.
        """
        standard = LightningCLI.subcommands()
        return {name: {*skipped, "weights_only", "verbose"} for name, skipped in standard.items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this project's own arguments and link the model's number of classes to the data."""
        parser.add_argument(
            "--include",
            type=list[str],
            default=[],
            help="Only inside a configuration file: configurations that are read before it.",
        )
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for checkpoints, logs and results; default runs/<name of the first --config>.",
        )
        parser.add_argument(
            "--imports",
            type=list[str],
            default=[],
            help="Python modules to import before anything is built, such as one that registers a metric.",
        )
        parser.add_argument(
            "--wandb", type=str, default="offline", help="Weights & Biases: offline, online or disabled."
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and remember them for `_configured_model`.

        Raises:
            InputError: the number of classes is given; the data has it, and the value would be ignored.
        """
        if given := [word for word in self.words if re.match(r"--model\.(init_args\.)?num_classes\b", word)]:
            raise InputError(f"{given[0]} has no effect, because the data has that number; leave it out.")
        self._arguments = args
        super().parse_arguments(parser, args)

    def _configured_model(self) -> Any:
        """Section `model` of files and arguments, without defaults and without values linked to the data."""
        configured: Any = self.parser.parse_args(self._arguments, defaults=False)
        return configured[self.subcommand].get("model") or {}

    def _resolve_run(self) -> None:
        """Determine the run folder and the checkpoint, before anything is built."""
        self.subcommand = self.config["subcommand"]
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir or Path("runs") / self.experiment)
        config.run_dir = str(run_dir)
        for name in config.imports:
            importlib.import_module(name)
        root_dir = config.trainer.default_root_dir
        if root_dir is not None and Path(root_dir).resolve() != run_dir.resolve():
            rank_zero_warn(f"trainer.default_root_dir {root_dir} is ignored; files go to --run_dir ({run_dir}).")
        config.trainer.default_root_dir = str(run_dir)
        if self.subcommand == "fit":
            check_trainable(config.data)
        # Before the trainer is built, which would fail earlier for want of a GPU or of the strategy's package.
        strategy = config.trainer.strategy
        check_strategy(strategy if isinstance(strategy, str) else strategy.class_path)
        loggers = config.trainer.get("logger") or []
        check_packages(getattr(one, "class_path", "") for one in (loggers if isinstance(loggers, list) else [loggers]))
        if not config.trainer.get("fast_dev_run"):
            check_writable(run_dir, "--run_dir")
            self.held.enter_context(locked(run_dir, str(self.subcommand)))
            if is_first_process():
                clean_run_folder(run_dir, str(self.subcommand))
        if self.subcommand == "fit" and config.get("ckpt_path") is None and restarted() and has_last(run_dir):
            config.ckpt_path = LAST
            rank_zero_info(f"SLURM has requeued this job: fit resumes from the last checkpoint in {run_dir}.")
        if config.get("ckpt_path") in CHECKPOINTS:
            config.ckpt_path = find_checkpoint(run_dir, config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, with loggers for the run folder unless the configuration has its own."""
        config = self.config[self.subcommand]
        if not config.trainer.get("fast_dev_run"):
            kwargs |= self._loggers(config)
        kwargs["callbacks"] = with_progress_bar(
            self.config_init[self.subcommand].trainer.get("callbacks") or [],
            config.trainer.get("enable_progress_bar") is not False,
        )
        plugins = self.config_init[self.subcommand].trainer.get("plugins") or []
        checkpoints = RunCheckpointIO([config.run_dir])
        kwargs["plugins"] = [checkpoints, *(plugins if isinstance(plugins, list) else [plugins])]
        trainer = super().instantiate_trainer(**kwargs)
        # Folders that the configuration itself gives to checkpoint callbacks. No state of a checkpoint has been loaded
        # yet, so that none of these paths can come from a foreign file.
        checkpoints.folders |= {resolved(d) for c in trainer.checkpoint_callbacks if (d := getattr(c, "dirpath", None))}
        return trainer

    def _loggers(self, config: Any) -> dict[str, Any]:
        """The argument `logger` of the trainer: the default loggers, or the configuration's own and the CSV log."""
        run_dir, command = Path(config.run_dir), str(self.subcommand)
        # A fresh fit archives the logs of an earlier one (`before_fit`), so that their name is free.
        version = command if self._is_fresh_fit() else unused_version(run_dir / "logs", command)
        if config.trainer.get("logger") in (None, True):
            return {"logger": default_loggers(run_dir, config.wandb, version)}
        own = self.config_init[self.subcommand].trainer.logger or []
        return {"logger": with_run_log(own if isinstance(own, list) else [own], run_dir, version) or False}

    def before_fit(self) -> None:
        """Move the files of an earlier fit to an archive folder if this fit starts afresh."""
        # Here the ranks are known, and no callback or logger has opened a file yet.
        check_monitors(self.trainer)
        archive = None
        if self._is_fresh_fit() and self.trainer.is_global_zero:
            archive = archive_fit(Path(self.config[self.subcommand].run_dir))
        if archive is not None:
            last = archive / "checkpoints" / f"{LAST}.ckpt"
            hint = f"; to resume that fit: --ckpt_path {last}" if last.is_file() else ""
            rank_zero_info(f"This fit starts afresh; the files of an earlier fit are now in {archive}{hint}.")

    def _check_run_folder(self) -> None:
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, RunConfigCallback):
                callback.check_run_folder(self.trainer)

    def after_fit(self) -> None:
        """Check that the run folder is still there, and print the best checkpoint and the command that tests it."""
        self._check_run_folder()
        say_fitted(self.trainer, self.words)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; a checkpoint that cannot be restored ends it with a sentence."""
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            raise
        except Exception as error:  # a stranger's checkpoint may fail in any way
            better = restore_error(error, self.config[subcommand].get("ckpt_path"))
            if better is None:
                raise
            raise better from error

    def before_validate(self) -> None:
        """Let SIGTERM end the command without waiting for the batch."""
        end_at_once()

    before_test = before_validate

    def after_validate(self) -> None:
        """Check that the run folder is still there, and print the metrics of the model."""
        self._check_run_folder()
        say_figures(self.trainer, "val")

    def after_test(self) -> None:
        """Check that the run folder is still there, and print the metrics of the model."""
        self._check_run_folder()
        say_figures(self.trainer, "test")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **quiet}

    def _parse_ckpt_path(self) -> None:
        """Let Lightning read the hyper-parameters of a checkpoint, after a check that they name no foreign class."""
        # First, because Lightning reads hyper-parameters of a file only: `best` must be a path by then.
        self._resolve_run()
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
        say_taken_over(path, self._configured_model(), built)
        arguments = built.get("init_args") or {}
        for name in WEIGHT_ARGUMENTS:
            gone = arguments.get(name) and not Path(os.path.expandvars(arguments[name])).is_file()
            # The checkpoint has every weight. A fit keeps the name, for the checkpoints that it will write.
            if gone or (name in arguments and self.subcommand != "fit"):
                arguments[name] = None

    def _is_fresh_fit(self) -> bool:
        """Whether this is a fit without a checkpoint that writes files, which `fast_dev_run` does not."""
        config = self.config[self.subcommand]
        return self.subcommand == "fit" and not config.get("ckpt_path") and not config.trainer.get("fast_dev_run")


def check_trainable(data: Any) -> None:
    """Raise InputError, before the network is built, for data without a training split.

    Args:
        data: the configuration's `data`, with `class_path`.
    """
    path = (data or {}).get("class_path")
    module, _, name = (path or "").rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module else None
    if not getattr(kind, "has_training_split", True):
        raise InputError(f"data: {path} has no training split, so this configuration can only be tested; run `test`.")


def train_or_evaluate(arguments: Sequence[str]) -> None:
    """Run a command with a trainer: `fit`, `validate` or `test`.

    Args:
        arguments: the words after `cli.py`, with the command among them.

    Raises:
        SystemExit: a wrong argument (status 2), SIGTERM or SIGHUP (status 143), or SIGINT (status 130).
    """
    requeue_on_signal()
    end_at_hangup()
    try:
        _run(expand_includes(arguments), experiment_name(configurations(arguments)), arguments)
    except SIGTERMException as error:
        # Lightning itself exits with status 0 after SIGTERM, as if the run were complete.
        _say("Terminated")
        raise SystemExit(128 + signal.SIGTERM) from error
    except KeyboardInterrupt as error:  # before the trainer runs
        _say("Interrupted")
        raise SystemExit(128 + signal.SIGINT) from error
    except SystemExit as error:
        # Lightning's answer to Ctrl-C, once the trainer runs.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        _say("Interrupted")
        raise SystemExit(128 + signal.SIGINT) from error
    except UserError:
        raise
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        better = explain_error(error, getattr(rank_zero_only, "rank", 0))
        if better is None:
            raise
        raise better from error


def end_at_hangup() -> None:
    """Let SIGHUP, when the terminal is closed, end the command as SIGTERM does; under `nohup` it stays ignored."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))


def end_at_once() -> None:
    """Let SIGTERM end an evaluation within the batch.

    Lightning waits for the end of the batch, which may take minutes where many maps are scored. Every finished unit of
    an evaluation is stored as a whole, so that an end at any moment loses only the unit at work.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        # A process that inherits the handler by fork has nothing to resume.
        raise SIGTERMException if os.getpid() == owner else SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _say(what: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"{what}; the same command (fit: with --ckpt_path last) resumes from here.", file=sys.stderr)


def _run(words: list[str], experiment: str, given: Sequence[str]) -> None:
    """Run the command of `words`, among which included configurations stand before the files that include them.

    Args:
        words: the arguments, with included configurations.
        experiment: default name of the run folder.
        given: the arguments as the user has given them.
    """
    # Lightning warns that `args` differ from sys.argv. sys.argv is left unchanged on purpose: the launcher starts
    # further ranks with it, and each of them expands its includes itself.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # A deprecation inside Lightning's use of torch, which a user cannot act upon.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # The logged means of maps' scores are those of all ranks already; for other values, such as `val/loss`, the
    # warning stays.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('(val|test)/[^']+/")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(no_noise)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(escape_controls)
    keep_freed_memory()
    with ExitStack() as held:
        LabnCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=42,
            trainer_defaults={
                "inference_mode": False,
                "use_distributed_sampler": False,
                # Its table lists metrics beside the network; RunProfile prints size and cost in one line.
                "enable_model_summary": False,
            },
            save_config_callback=RunConfigCallback,
            parser_class=SentenceParser,
            parser_kwargs={"description": DESCRIPTION},
            # The included files are among the words by now. Their paths, relative to the including file, would be
            # wrong in a configuration that is printed or saved, so that the field is emptied.
            args=[*words, "--include=[]"] if "--config" in words else words,
            auto_configure_optimizers=False,
            experiment=experiment,
            words=given,
            held=held,
        )
