"""Configurations that name other ones under `parts:`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from labn.errors import InputError, MissingFileError
from labn.io.readers import read_yaml


def expand_parts(argv: Sequence[str]) -> list[str]:
    """Put the files that a configuration names under `parts:` in front of it, as configurations of their own.

    Paths are relative to the naming file; parts may name parts. Later files win, so an experiment overrides its parts.

    Raises:
        FileNotFoundError: a part does not exist.
        ValueError: a part is no YAML, or unfolds into a huge one; or `--parts` is among the words.
    """
    if any(word.split("=")[0] in ("--parts", "--parts+") for word in argv):
        raise InputError("--parts is a key of configuration files; on the command line, give the file with --config.")
    expanded: list[str] = []
    waiting = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    for position, word in enumerate(waiting):
        if position and waiting[position - 1] in ("--config", "-c"):
            expanded.pop()
            expanded += [item for path in with_parts(Path(word)) for item in ("--config", str(path))]
        else:
            expanded.append(word)
    return expanded


def with_parts(path: Path, naming: Sequence[Path] = ()) -> list[Path]:
    """`path` behind all the files that it names under `parts:`, depth first.

    Args:
        path: a configuration.
        naming: those that have led to it.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: `parts` is no list of files, or leads back to a file that named it.
    """
    if not path.is_file():
        raise MissingFileError(f"--config {path} is not a file.")
    if any(path.samefile(other) for other in naming):
        raise InputError(f"{path} is its own part: {' -> '.join(map(str, [*naming, path]))}; take one of these out.")
    content = read_yaml(path)
    parts = content.get("parts") if isinstance(content, dict) else None
    parts = [] if parts is None else parts
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{path}: parts is {parts!r}; it must be a list of files, such as [parts/trainer.yaml].")
    return [p for part in parts for p in with_parts(path.parent / part, [*naming, path])] + [path]
