"""Configurations that build on other ones: the key `include:`.

LightningCLI's own means do not give one file per experiment: `--config` several times moves the choice to the command
line, and a file for a single group (`data: data.yaml`) cannot be combined with entries of the same group, so that an
experiment could not append its callbacks to those of a shared trainer. So a file may name others under `include:`, and
the command line reads these first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from labn.errors import InputError, MissingFileError
from labn.io.readers import read_yaml

CONFIG = "--config"
CONFIGS = Path(__file__).parents[2] / "configs"


def expand_includes(argv: Sequence[str]) -> list[str]:
    """Put the files that a configuration includes in front of it, as `--config` arguments of their own.

    Later files win, so an experiment overrides the files that it includes. A file that several include is read once, at
    its first place.

    Raises:
        MissingFileError: an included file does not exist.
        InputError: a file is no YAML or unfolds into a huge one, or `--include` is among the arguments.
    """
    if any(word.split("=")[0] in ("--include", "--include+") for word in argv):
        raise InputError("--include is a key of configuration files; on the command line, give the file with --config.")
    expanded: list[str] = []
    words = [word for argument in argv for word in _separated(argument)]
    read: set[Path] = set()
    for position, word in enumerate(words):
        if position and words[position - 1] == CONFIG:
            expanded.pop()
            *included, named = with_includes(Path(word))
            # A second time, a shared file would undo what an experiment between has changed.
            for path in [*(path for path in included if path.resolve() not in read), named]:
                expanded += [CONFIG, str(path)]
                read.add(path.resolve())
        else:
            expanded.append(word)
    return expanded


def _separated(argument: str) -> list[str]:
    """Split `--config=FILE`, and write every spelling of the option that the parser accepts as `--config`."""
    found = re.match(r"(--co(?:n|nf|nfi|nfig)?|-c)(=.*)?$", argument, re.DOTALL)
    if found:
        return [CONFIG] if found[2] is None else [CONFIG, found[2][1:]]
    # `-cFILE`; no other option begins with a single dash and a c.
    return [CONFIG, argument[2:]] if re.match(r"-c.", argument) else [argument]


def configurations(argv: Sequence[str]) -> list[Path]:
    """The files that `--config` names in the arguments of a command, in order, without the files that they include."""
    words = [word for argument in argv for word in _separated(argument)]
    return [Path(word) for option, word in pairwise(words) if option == CONFIG]


def experiment_name(files: Sequence[Path]) -> str:
    """The name of the run folder: that of the first configuration, without its suffix; `default` without any.

    Example:
        >>> experiment_name([Path("configs/idrid/idrid_labn.yaml"), Path("configs/shared/ddp.yaml")])
        'idrid_labn'
    """
    return files[0].stem if files else "default"


def with_includes(path: Path, including: Sequence[Path] = ()) -> list[Path]:
    """All files that `path` includes, depth first and each of them once, and `path` itself as the last one.

    Args:
        path: a configuration; included paths are relative to its folder or, where nothing is there, to `configs/`, so
            that a copy of one of our configurations may lie anywhere.
        including: the files that have led to `path`.

    Raises:
        MissingFileError: `path` does not exist.
        InputError: `include` is no list of files, or leads back to a file that included it.
    """
    if not path.is_file():
        named = f"{including[-1]} includes {path}, which" if including else f"--config {path}"
        raise MissingFileError(f"{named} is not a file.")
    if any(path.samefile(other) for other in including):
        chain = " -> ".join(map(str, [*including, path]))
        raise InputError(f"{path} includes itself: {chain}; take one of these out.")
    content = read_yaml(path)
    included = content.get("include") if isinstance(content, dict) else None
    included = [] if included is None else included
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise InputError(f"{path}: include is {included!r}; it must be a list of files, such as [shared/trainer.yaml].")
    files: dict[Path, Path] = {}
    for name in included:
        beside, ours = path.parent / name, CONFIGS / name
        for file in with_includes(beside if beside.exists() or not ours.exists() else ours, [*including, path]):
            files.setdefault(file.resolve(), file)
    return [*files.values(), path]
