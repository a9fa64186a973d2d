"""`python cli.py sweep`: train and test one configuration with several seeds, one run folder per seed, resumably."""

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

DETAILS = """\
The same command again skips finished steps and resumes interrupted ones. All arguments after `--` are passed to fit
and test:

  python cli.py sweep --config configs/idrid/idrid_labn.yaml --seeds 38 39 40 41 42 -- --wandb=disabled
"""
STATE = "sweep.json"
STEPS = ("fit", "test")
Runner = Callable[[list[str], Path], int]


@dataclass(frozen=True)
class Sweep:
    """A configuration and the seeds with which it is run.

    Attributes:
        configs: configuration files of fit and test; later ones override earlier ones.
        fit_configs: further files for fit only.
        test_configs: further files for test only.
        seeds: one run per seed, which determines initialisation, order of the training samples and augmentation, but
            not the split.
        folder: folder of the run folders `seed=<n>/`.
        options: further arguments of both commands, such as `--trainer.max_epochs=3`.
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
        """The identity of a step: its arguments and the hashes of all files that it reads.

        Raises:
            MissingFileError: one of the files does not exist.
        """
        files = _files_read(_named(self.files(step)))
        every = [*files, *_files_read(self.options)]
        # Contents and not dates: a copied or checked-out configuration is the same one.
        contents = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] for file in every}
        return {"words": [step, *_named(files), *self._rest(seed)], "files": contents}


def _named(files: Sequence[str]) -> list[str]:
    return [f"--config={file}" for file in files]


def _files_read(words: Sequence[str]) -> list[str]:
    """All configurations that a command reads, in order: those in `words`, each after the files that it includes."""
    return [str(path) for path in configurations(expand_includes(words))]


def start(words: list[str], log: Path) -> int:
    """Run `python -m cli <words>`, append its output to `log`, and return its exit status."""
    # A process of its own per step: a crash, a kill or leaked memory does not end the sweep.
    with log.open("a") as file:
        return subprocess.run([sys.executable, "-m", "cli", *words], stdout=file, stderr=file, check=False).returncode


def run_all(sweep: Sweep, runner: Runner = start) -> None:
    """Train and test every seed; skip finished steps, and resume interrupted ones.

    Args:
        sweep: configuration and seeds.
        runner: function that runs a command with the given arguments and log file and returns its exit status.

    Raises:
        MissingFileError: a configuration, or a file that it includes, does not exist.
        InputError: a folder was trained with other arguments or other configuration files.
        FailedProcessError: a command failed; the message names its log.
    """
    # Reads the files of both steps, so that a missing file of the test is reported before hours of training.
    for step in STEPS:
        sweep.signature(step, sweep.seeds[0])
    for seed in sweep.seeds:
        folder = sweep.run_dir(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for step in STEPS:
            _step(sweep, step, seed, folder, runner)
    # The path is quoted for the shell, the star is not: the shell expands it.
    print(f"All seeds in one table: python cli.py compare {shlex.quote(str(sweep.folder))}/seed=*", flush=True)


def _step(sweep: Sweep, step: str, seed: int, folder: Path, runner: Runner) -> None:
    path = folder / STATE
    state = read_json(path, dict) if path.exists() else {}
    signature, earlier = sweep.signature(step, seed), state.get(step, {})
    same = earlier.get("signature") == signature
    if same and earlier.get("done"):
        print(f"{folder}: {step} is done already.", flush=True)
        return
    # A changed test is simply run again; a changed training would mix two networks in one folder.
    if step == "fit" and earlier and not same:
        raise InputError(
            f"{folder} was trained with other arguments or configuration files (see {path}); "
            "give the sweep another --run_dir, or remove that folder."
        )
    # Written before the step starts: a fit that is killed is recognised, and resumed only with the same settings.
    state[step] = {"signature": signature, "done": False}
    write_atomically(path, json.dumps(state, indent=1).encode())
    log = folder / f"{step}.log"
    print(f"{folder}: {step} ... ({log})", flush=True)
    # Only the named files are passed on, because the command itself inserts the included ones before them.
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
    parser.add_argument("--config", action="append", required=True, help="configuration of fit and test; repeatable")
    parser.add_argument("--fit_config", action="append", default=[], help="read by fit only, after --config")
    parser.add_argument("--test_config", action="append", default=[], help="read by test only, after --config")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="the papers used five: 38 39 40 41 42")
    parser.add_argument("--run_dir", type=Path, help="default runs/<name of the first --config>")
    parser.add_argument("options", nargs="*", help="further arguments of fit and test, after --")


def run(options: argparse.Namespace) -> None:
    """Train and test every seed; errors as in `run_all`."""
    folder = options.run_dir or Path("runs") / experiment_name([Path(file) for file in options.config])
    files = tuple(options.config), tuple(options.fit_config), tuple(options.test_config)
    run_all(Sweep(*files, tuple(options.seeds), folder, tuple(options.options)))
