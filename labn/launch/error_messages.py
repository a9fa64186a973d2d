"""One-sentence versions of long error messages of torch and jsonargparse."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from labn.errors import InputError, LostProcessError, MissingFileError, UserError
from labn.perturbation.engine import is_out_of_memory

CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Texts in the errors of gloo's and NCCL's collectives when another process of the run has ended."""

NOISE = re.compile(
    r"(- )?(Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Not a valid subclass of"
    r"|Subclass types expect|a class path \(|a dict with|Given value)"
)
"""Lines of jsonargparse's messages that describe types and not the mistake."""

LAYOUTS = (
    (
        re.compile(r"Expected an instantiatable class, but (\S+) is abstract"),
        r"the layout must be {class_path: <a class derived from \1>, init_args: {<argument>: <value>}}",
    ),
    (re.compile(r"Expected a <class 'dict'>"), "the layout must be {<name>: <value>}"),
)
"""Pattern of jsonargparse's message about a value of a wrong layout -> text that shows the right layout."""


class OutOfMemory(UserError, torch.OutOfMemoryError):
    """The memory of an accelerator or of the CPU is exhausted; the message names the setting to lower."""


SINGLE_VALUE = "Expected more than 1 value per channel when training"
"""Text in torch's error about a BatchNorm that gets one value per channel, whose variance is not defined."""


def explain_error(error: Exception, rank: int) -> UserError | None:
    """An error with advice for exhausted memory, a lost process or checkpoint, or a BatchNorm of one value; else None.

    Args:
        error: the error that ended a command with a trainer.
        rank: rank of this process.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    again = "the same command (fit: with --ckpt_path last) continues from the files on disk"
    if isinstance(error, FileNotFoundError):
        path = str(error.filename or str(error).rpartition(": ")[2])
        if not path.endswith(".ckpt"):
            return None
        return MissingFileError(
            f"{path} has gone since this command began, as when a fit starts afresh in the same folder; start "
            "the command again."
        )
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return OutOfMemory(f"Rank {rank} is out of memory ({reason}): lower data.init_args.batch_size, and {again}.")
    if SINGLE_VALUE in str(error):
        return InputError(
            f"A training batch of one image gives a BatchNorm one value per channel ({reason}): raise "
            "data.init_args.batch_size or data.init_args.image_size; if only the last batch has one image, set "
            "data.init_args.drop_last to true."
        )
    if any(word in str(error) for word in CONNECTION_LOST):
        return LostProcessError(f"Rank {rank} has lost another process, whose own message says why: {again}.")
    return None


RESTORING = "checkpoint_connector.py"
"""File of Lightning that restores what a checkpoint holds."""


def restore_error(error: Exception, path: Any) -> UserError | None:
    """A sentence about a checkpoint whose content made Lightning or PyTorch fail; None for any other error.

    Args:
        error: an error without a sentence of its own.
        path: the checkpoint.
    """
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    if not any(f.filename.endswith(RESTORING) and "dump" not in f.name for f in frames):
        return None
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else ""
    return InputError(
        f"{path} cannot be restored ({type(error).__name__}: {reason}): it is damaged, or of another program; give "
        "another checkpoint."
    )


def config_sentence(message: str, options: Sequence[str] = ()) -> str:
    """The mistake in a configuration in one line: the path of keys, the mistake, and similar valid names.

    Args:
        message: jsonargparse's message, which also lists every type that would be valid.
        options: names of the command's options.
    """
    lines = [line.strip() for line in message.splitlines()]
    steps = [line.removeprefix("- ").removesuffix(":") for line in lines if line and not NOISE.match(line)]
    if len(steps) < 2 and len(lines) > 1:  # the message has nothing but types, so it is kept whole
        return message
    steps = [re.sub(r"^(Parser key|Problem with given class_path) ['\"](.*)['\"]$", r"\2", line) for line in steps]
    for mistake, layout in LAYOUTS:
        steps = [mistake.sub(layout, line) for line in steps]
    owner = steps[-2] if len(steps) > 1 else ""
    return ": ".join(dict.fromkeys(steps)).rstrip(".") + _near_names(steps[-1], owner, options)


def _near_names(mistake: str, owner: str, options: Sequence[str]) -> str:
    """`; did you mean ...?` for an unknown argument of class `owner`, option of the command, or name in a module."""
    if unknown := re.search(r"Option '(\S+)' is not accepted", mistake):
        names: Sequence[str] = _arguments(owner)
    elif unknown := re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", mistake):
        names = options
    elif unknown := re.search(r"module '\S+' has no attribute '(\S+)'", mistake):
        module = owner.rpartition(".")[0]
        names = [name for name in dir(importlib.import_module(module)) if name[:1].isupper()] if module else []
    if not unknown:
        return "."
    near = difflib.get_close_matches(unknown[1], names, n=3)
    return f"; did you mean {', '.join(near)}?" if near else "."


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class and its bases."""
    module, _, name = class_path.rpartition(".")
    value = getattr(importlib.import_module(module), name, None) if module else None
    bases = inspect.getmro(value) if isinstance(value, type) else ()
    return [
        parameter.name
        for base in bases
        if "__init__" in vars(base)
        for parameter in inspect.signature(vars(base)["__init__"]).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
