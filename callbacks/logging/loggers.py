"""The loggers of a command: a CSV log in the run folder, and Weights & Biases or those of the configuration."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger

from callbacks.logging.csv_logger import RunLogger
from callbacks.logging.wandb_logger import RunWandbLogger
from labn.errors import InputError
from labn.io.readers import first_line

WANDB_MODES = ("offline", "online", "disabled")
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow",),
    "WandbLogger": ("wandb",),
}
"""Lightning's loggers that need a package of their own -> the packages, of which one is enough."""


def default_loggers(run_dir: Path, wandb_mode: str, version: str) -> list[Logger]:
    """A CSV logger for `<run_dir>/logs/<version>` and, unless disabled or unavailable, a Weights & Biases logger.

    Args:
        run_dir: the run folder.
        wandb_mode: `offline`, `online` or `disabled`.
        version: folder of the CSV log, see `unused_version`.

    Raises:
        InputError: `wandb_mode` has another value.
    """
    if wandb_mode not in WANDB_MODES:
        raise InputError(f"--wandb is {wandb_mode!r}; it must be offline, online or disabled.")
    run_dir.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [RunLogger(save_dir=run_dir, name="logs", version=version)]
    wandb = None if wandb_mode == "disabled" else wandb_logger(run_dir, wandb_mode)
    return loggers if wandb is None else [*loggers, wandb]


def check_packages(class_paths: Iterable[str]) -> None:
    """Raise InputError for a logger whose package is not installed."""
    for path in class_paths:
        logger = path.rpartition(".")[2]
        packages = PACKAGES.get(logger, ())
        if packages and not any(find_spec(package) for package in packages):
            raise InputError(f"{logger} needs the package {packages[0]}: pip install {packages[0]}.")


def with_run_log(loggers: list[Logger], run_dir: Path, version: str) -> list[Logger]:
    """Loggers of a configuration behind the CSV log of the run folder, which the report and `compare` read.

    Args:
        loggers: the loggers of the configuration; an empty list stays empty.
        run_dir: the run folder.
        version: folder of the CSV log, see `unused_version`.
    """
    log = RunLogger(save_dir=run_dir, name="logs", version=version)
    places = [Path(logger.log_dir).resolve() for logger in loggers if isinstance(logger, CSVLogger)]
    return loggers if not loggers or Path(log.log_dir).resolve() in places else [log, *loggers]


def wandb_logger(run_dir: Path, mode: str) -> Logger | None:
    """A Weights & Biases logger; `online` falls back to an offline run, which `wandb sync` can upload later.

    Returns:
        None, after a warning, if no working package is installed; the run folder holds all results in any case.
    """
    # The package's own lines, such as one about a setting that nobody has set; `say_wandb` prints where the run is.
    os.environ.setdefault("WANDB_SILENT", "true")
    # `wandb sync` looks for the pictures of tables in this folder; the package's default is outside the run folder.
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").absolute()))
    for offline in (True,) if mode == "offline" else (False, True):
        try:
            logger = RunWandbLogger(project="labn", name=run_dir.name, save_dir=run_dir, offline=offline)
            # The property connects to the service, so that a failure shows here and not in the middle of the run.
            _ = logger.experiment
            return logger
        except Exception as error:
            instead = "all results are" if offline else "logging offline; all results are"
            warnings.warn(
                f"Weights & Biases is not available ({first_line(error)}); {instead} in {run_dir}.", stacklevel=2
            )
    return None


def unused_version(logs: Path, command: str) -> str:
    """The first of `fit`, `fit-1`, `fit-2`, ... that holds no log yet; Lightning deletes the log of a used version."""
    names = itertools.chain([command], (f"{command}-{n}" for n in itertools.count(1)))
    return next(name for name in names if not (logs / name / "metrics.csv").exists())
