"""Train and test one configuration with several seeds, a folder per seed, again and again until all of it is there."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labn.errors import FailedProcessError, InputError
from labn.io.atomic import write_atomically
from labn.io.readers import read_json
from labn.launch.config_include import configurations, expand_includes, experiment_name

SUMMARY = "Fit and test a configuration once per seed, in RUN_DIR/seed=N/."
DETAILS = """\
The same command again skips what is finished and resumes what was interrupted. All words behind `--` go to both
commands:

  python cli.py sweep --config configs/idrid/idrid_labn.yaml --seeds 38 39 40 41 42 -- --wandb=disabled
"""
STATE = "sweep.json"
STEPS = ("fit", "test")
Runner = Callable[[list[str], Path], int]


@dataclass(frozen=True)
class Sweep:
    """A configuration and the seeds that it is run with.

    Attributes:
        configs: configuration files of training and test, later ones overriding earlier ones.
        fit_configs: further files that only training reads.
        test_configs: further files that only the test reads.
        seeds: one run each: initialisation, order of the training samples and augmentation; never the split.
        folder: holds `seed=<n>/`, each a run folder of its own.
        options: further words of both commands, such as `--trainer.max_epochs=3`.
    """

    configs: tuple[str, ...]
    fit_configs: tuple[str, ...]
    test_configs: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: Path
    options: tuple[str, ...] = ()

    def run_dir(self, seed: int) -> Path:
        """Run folder of a seed."""
        return self.folder / f"seed={seed}"

    def files(self, step: str) -> tuple[str, ...]:
        """Configuration files of `fit` or `test`, in the order in which they are read."""
        return self.configs + (self.test_configs if step == "test" else self.fit_configs)

    def words(self, step: str, seed: int) -> list[str]:
        """Arguments of `fit` or `test` for a seed, without the checkpoint."""
        return [step, *_named(self.files(step)), *self._rest(seed)]

    def _rest(self, seed: int) -> list[str]:
        seeded = [f"--seed_everything={seed}", f"--data.init_args.seed={seed}", f"--run_dir={self.run_dir(seed)}"]
        return [*seeded, *self.options]

    def signature(self, step: str, seed: int) -> dict[str, Any]:
        """The identity of a finished step: its arguments and the contents of all files that it reads.

        Raises:
            FileNotFoundError: one of them does not exist.
        """
        files = _files_read(_named(self.files(step)))
        every = [*files, *_files_read(self.options)]
        contents = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] for file in every}
        return {"words": [step, *_named(files), *self._rest(seed)], "files": contents}


def _named(files: Sequence[str]) -> list[str]:
    return [f"--config={file}" for file in files]


def _files_read(words: Sequence[str]) -> list[str]:
    """The configurations that a command reads, in order: those in `words`, each behind the files that it includes."""
    return [str(path) for path in configurations(expand_includes(words))]


def start(words: list[str], log: Path) -> int:
    """Run `python -m cli <words>` and append what it prints to `log`; its exit status."""
    with log.open("a") as file:
        return subprocess.run([sys.executable, "-m", "cli", *words], stdout=file, stderr=file, check=False).returncode


def run_all(sweep: Sweep, runner: Runner = start) -> None:
    """Train and test every seed; what is finished is left alone, what was interrupted goes on.

    Args:
        sweep: what to run.
        runner: runs the words of a command, with a log file, and returns the exit status.

    Raises:
        FileNotFoundError: a configuration, or a file that it includes, does not exist.
        ValueError: a folder was trained with other arguments or other configuration files.
        ChildProcessError: a command failed; the log is named.
    """
    # A file of the test that is missing is better known now than after a training.
    for step in STEPS:
        sweep.signature(step, sweep.seeds[0])
    for seed in sweep.seeds:
        folder = sweep.run_dir(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for step in STEPS:
            _step(sweep, step, seed, folder, runner)
    # The star is the shell's.
    print(f"All seeds in one table: python cli.py compare {shlex.quote(str(sweep.folder))}/seed=*", flush=True)


def _step(sweep: Sweep, step: str, seed: int, folder: Path, runner: Runner) -> None:
    path = folder / STATE
    state = read_json(path, dict) if path.exists() else {}
    wanted, known = sweep.signature(step, seed), state.get(step, {})
    same = known.get("signature") == wanted
    if same and known.get("done"):
        print(f"{folder}: {step} is done already.", flush=True)
        return
    if step == "fit" and known and not same:
        raise InputError(
            f"{folder} was trained with other arguments or configuration files (see {path}); "
            "give the sweep another --run_dir, or remove that folder."
        )
    state[step] = {"signature": wanted, "done": False}
    write_atomically(path, json.dumps(state, indent=1).encode())
    log = folder / f"{step}.log"
    print(f"{folder}: {step} ... ({log})", flush=True)
    # The files as they were named: the command puts the included ones in front of them itself.
    if status := runner([*sweep.words(step, seed), *_checkpoint(step, folder)], log):
        raise FailedProcessError(f"{step} of {folder} ended with status {status}; its last lines are in {log}.")
    state[step]["done"] = True
    write_atomically(path, json.dumps(state, indent=1).encode())


def _checkpoint(step: str, folder: Path) -> list[str]:
    if step == "test":
        return ["--ckpt_path=best"]
    saved = [folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous")]
    return ["--ckpt_path=last"] if any(path.exists() for path in saved) else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", action="append", required=True, help="as of fit; may come several times")
    parser.add_argument("--fit_config", action="append", default=[], help="read by fit only, after --config")
    parser.add_argument("--test_config", action="append", default=[], help="read by the test only, after --config")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="the papers used five: 38 39 40 41 42")
    parser.add_argument("--run_dir", type=Path, help="default runs/<name of the first --config>")
    parser.add_argument("options", nargs="*", help="further words of fit and test, behind --")


def run(options: argparse.Namespace) -> None:
    """Train and test every seed; as `run_all` for the raised errors."""
    folder = options.run_dir or Path("runs") / experiment_name([Path(file) for file in options.config])
    files = tuple(options.config), tuple(options.fit_config), tuple(options.test_config)
    run_all(Sweep(*files, tuple(options.seeds), folder, tuple(options.options)))
