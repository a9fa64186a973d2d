"""The command line: `python cli.py {fit,validate,test} --config configs/<experiment>.yaml`, and the other `COMMANDS`.

Everything that takes seconds to import is imported by the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labn.commands import COMMANDS
from labn.errors import InputError, printable, sentence_of
from labn.launch.orphans import end_with_launcher

# Before anything that takes seconds to import, and also where `ddp_spawn` imports this file in another process.
end_with_launcher()
# albumentations asks a server for its newest version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("LABN_DATA", "../shared/data")

DESCRIPTION = "Train image classifiers, explain their predictions with maps, and measure how good the maps are."

TRAINER_COMMANDS = {
    "fit": "Train a network, and validate it after every epoch.",
    "validate": "Explain and score a network on the validation split.",
    "test": "Explain and score a network on the test split.",
}
"""Commands of LightningCLI, with a trainer."""


def help_text() -> str:
    """The text of `--help`: every command with its summary."""
    listed = [f"    {name:<12}{summary}" for name, summary in {**TRAINER_COMMANDS, **COMMANDS}.items()]
    return "\n".join(
        [
            "usage: cli.py COMMAND ...",
            "",
            DESCRIPTION,
            "",
            "commands:",
            *listed,
            "",
            "Every command has a --help of its own.",
            "",
            "python cli.py fit --config configs/quickstart.yaml",
            "python cli.py test --config configs/quickstart.yaml --ckpt_path best",
        ]
    )


def run_command(name: str, argv: Sequence[str]) -> None:
    """Run one of `COMMANDS`; an error that is meant for the user prints its sentence and exits with status 2."""
    command = importlib.import_module(f"labn.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"cli.py {name}",
        description=COMMANDS[name],
        epilog=command.DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    options = parser.parse_args(argv)
    try:
        command.run(options)
    except Exception as error:
        # The system's own errors (OSError) name the file, so that they need no traceback either.
        sentence = str(error) if isinstance(error, OSError) else sentence_of(error)
        if sentence is None:
            raise
        parser.exit(getattr(error, "exit_status", 2), f"{parser.prog}: {printable(sentence)}\n")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings as `Warning: <text>` within the block, with control characters of names escaped.

    With `LABN_TRACEBACK=1` in the environment they also show the source line.
    """
    standard, is_plain = warnings.formatwarning, os.environ.get("LABN_TRACEBACK", "0") == "0"

    def formatted(message: Warning | str, *arguments: Any, **options: Any) -> str:
        text = printable(str(message), keep="\n")
        return f"Warning: {text}\n" if is_plain else standard(text, *arguments, **options)

    warnings.formatwarning = formatted  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = standard


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments; None takes those of the process.

    Raises:
        InputError: the command does not exist.
        SystemExit: a wrong argument (status 2), or SIGTERM (status 143).
    """
    end_with_launcher()
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    names = [*TRAINER_COMMANDS, *COMMANDS]
    if first in ("", "-h", "--help"):
        print(help_text())
        sys.exit(0 if first else 2)
    if first in COMMANDS:
        run_command(first, arguments[1:])
    elif first.startswith("-") or first in TRAINER_COMMANDS:
        importlib.import_module("callbacks.lightning_cli").train_or_evaluate(arguments)
    else:
        near = difflib.get_close_matches(first, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"there is no command {first!r}; {hint}The commands are {', '.join(names)}.")


def missing_package(error: BaseException) -> str | None:
    """What to install, if a file of this project has imported a package that is not there; else None.

    An import of the user's own code says nothing about this project's environment, and keeps its traceback.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    frames = [
        frame.filename for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    here = Path(__file__).resolve().parent
    importer = Path(frames[-1]).resolve() if frames else here
    if not any(importer.is_relative_to(here / room) for room in ("labn", "callbacks", "datamodules", "cli.py")):
        return None
    return (
        f"the package {error.name.partition('.')[0]} is not installed for {sys.executable}; run `python3 -m venv .venv "
        f"&& .venv/bin/pip install -e .` in {here}, then `.venv/bin/python cli.py`."
    )


def console() -> None:
    """Entry point of the terminal: an error that is meant for the user prints its sentence and exits with status 1.

    Any other exception keeps its traceback. With `LABN_TRACEBACK=1` in the environment every error has one.
    """
    try:
        with plain_warnings():
            main()
    except Exception as error:
        sentence = sentence_of(error) or missing_package(error)
        if sentence is None or os.environ.get("LABN_TRACEBACK", "0") != "0":
            raise
        print(f"cli.py: {sentence}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    console()
