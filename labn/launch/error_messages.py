"""One sentence instead of what torch, jsonargparse and Python say at length."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence

import torch

from labn.errors import LostProcessError, UserError
from labn.perturbation.engine import is_out_of_memory

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What the collectives of gloo and NCCL say when another process of the run has ended."""

NOISE = re.compile(
    r"(- )?(Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Not a valid subclass of"
    r"|Subclass types expect|a class path \(|a dict with|Given value)"
)
"""Lines of jsonargparse that describe its types and not the mistake."""

LAYOUTS = (
    (
        re.compile(r"Expected an instantiatable class, but (\S+) is abstract"),
        r"the layout must be {class_path: <a class derived from \1>, init_args: {<argument>: <value>}}",
    ),
    (re.compile(r"Expected a <class 'dict'>"), "the layout must be {<name>: <value>}"),
)
"""What jsonargparse says about a value of another layout, and what shows the right one."""


class OutOfMemory(UserError, torch.OutOfMemoryError):
    """Memory has run out, on an accelerator or on the CPU; the message says what to lower."""


def explained(error: RuntimeError, rank: int) -> UserError | None:
    """An error with a sentence that helps, where the sentence of torch does not; else None.

    Args:
        error: what ended a command with a trainer.
        rank: this process.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    again = "the same command (fit: with --ckpt_path last) goes on from what is on disk"
    if is_out_of_memory(error):
        return OutOfMemory(f"Rank {rank} is out of memory ({reason}): lower data.init_args.batch_size, and {again}.")
    if any(word in str(error) for word in GONE):
        return LostProcessError(f"Rank {rank} has lost another process, whose own message says why: {again}.")
    return None


def config_sentence(message: str, options: Sequence[str] = ()) -> str:
    """The mistake in a configuration, in one line: the keys that lead to it, what is wrong, the nearest right names.

    Args:
        message: what jsonargparse says, which lists every type that would have been right.
        options: names of the options that the command has.
    """
    lines = [line.strip() for line in message.splitlines()]
    told = [line.removeprefix("- ").removesuffix(":") for line in lines if line and not NOISE.match(line)]
    if len(told) < 2 and len(lines) > 1:  # nothing but types was wrong: they are what there is to say
        return message
    told = [re.sub(r"^(Parser key|Problem with given class_path) ['\"](.*)['\"]$", r"\2", line) for line in told]
    for mistake, layout in LAYOUTS:
        told = [mistake.sub(layout, line) for line in told]
    owner = told[-2] if len(told) > 1 else ""
    return ": ".join(dict.fromkeys(told)).rstrip(".") + _near_names(told[-1], owner, options)


def _near_names(mistake: str, owner: str, options: Sequence[str]) -> str:
    """`; did you mean ...?` for an unknown option of the class `owner`, of the command, or name in a module."""
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
    """Names of what a class and its bases are built with."""
    module, _, name = class_path.rpartition(".")
    built = getattr(importlib.import_module(module), name, None) if module else None
    bases = inspect.getmro(built) if isinstance(built, type) else ()
    return [
        key
        for base in bases
        if "__init__" in vars(base)
        for key in inspect.signature(vars(base)["__init__"]).parameters
    ]
