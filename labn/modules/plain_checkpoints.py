"""Checkpoints of unknown origin: reading them without running code, and checking the classes that they name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from labn.errors import InputError
from labn.models.checkpoints import read_checkpoint
from labn.modules.restore import WEIGHT_ARGUMENTS, check_own_network

_CLASS_KEYS = ("class_path", "_class_path")
_FILE_KEYS = (*WEIGHT_ARGUMENTS, "weights")


SPAWNED = ".temp.ckpt"
"""File of weights alone, in a temporary folder, by which Lightning's spawned processes hand them to the first one."""


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints as Lightning does, and reads them as tensors and plain data only.

    In Lightning, `weights_only`, an environment variable, and whether the path is a URL decide whether a checkpoint may
    run code. Here it never may.
    """

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU; `map_location` and `weights_only` have no effect.

        Raises:
            MissingFileError: the local file does not exist.
            InputError: the file names code, is damaged, or is not a checkpoint of a LightningModule.
        """
        content = read_checkpoint(path)
        if isinstance(content, dict) and Path(path).name == SPAWNED:
            return content
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise InputError(
                f"{path} is not a checkpoint of `cli.py fit`; pass weights alone as backbone_ckpt, or to `explain`."
            )
        return content


def check_own_classes(path: Any, content: Any, allowed: Collection[str]) -> None:
    """Check a checkpoint's hyper-parameters, whose classes the command line would import and instantiate.

    The command line also reads texts as settings: a text in YAML, the name of a file with YAML, and the bare name of a
    class. Each of these could name a class. They are refused, except in arguments of type str, which stay texts.

    Args:
        path: the file, for the message.
        content: the content of the checkpoint.
        allowed: class paths that the configuration names; classes of `labn` are always allowed.

    Raises:
        InputError: the hyper-parameters name another class, or contain a text that would be read as settings.
    """
    arguments = content.get("hyper_parameters") if isinstance(content, dict) else None
    check_own_network(path, arguments, allowed)
    for name in _class_paths(arguments):
        if name not in allowed and not _is_own(name):
            raise InputError(
                f"{path} asks for the class {name}, which neither this project nor the configuration names; "
                "name it in the configuration if it is yours."
            )
    if not isinstance(arguments, dict):
        return
    texts = _text_arguments(arguments.get("_class_path"))
    for name, value in arguments.items():
        if name in texts or name in (*_CLASS_KEYS, "_instantiator"):
            continue
        for key, text in _texts(value, name):
            if text not in allowed and (_is_settings(text) or (key not in _FILE_KEYS and _names_settings(text))):
                raise InputError(
                    f"{path} has the text {text!r} in its hyper-parameter {name}, which would be read as settings or "
                    "as a class; use a checkpoint that `cli.py fit` has written."
                )


def check_same_class(path: Any, content: Any, configured: str | None) -> None:
    """Check that a checkpoint's module has the class of the configuration's, which it would silently replace.

    Args:
        path: the file, for the message.
        content: the content of the checkpoint.
        configured: class path of the configuration's model.

    Raises:
        InputError: the checkpoint holds a module of another class.
    """
    arguments = content.get("hyper_parameters") if isinstance(content, dict) else None
    saved = arguments.get("_class_path") if isinstance(arguments, dict) else None
    if saved and configured and str(saved).rpartition(".")[2] != str(configured).rpartition(".")[2]:
        raise InputError(
            f"{path} holds a {saved}, but the configuration asks for a {configured}; use the configuration that it "
            "was trained with."
        )


def _class_paths(content: Any) -> Iterator[str]:
    """All class paths in nested dicts, lists, tuples and dataclasses."""
    if is_dataclass(content):
        content = vars(content)
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _CLASS_KEYS:
                yield str(value)
            yield from _class_paths(value)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _class_paths(item)


def _is_own(class_path: str) -> bool:
    """Whether a class path leads to a class that this package defines, and not to one that a module of it imports."""
    module, _, name = class_path.rpartition(".")
    if not module.startswith("labn."):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return str(getattr(found, "__module__", "")).startswith("labn.")


def _text_arguments(class_path: Any) -> set[str]:
    """Names of the arguments of type str, or str and None, of a class."""
    module, _, name = str(class_path or "").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return set()
    parameters = inspect.signature(found).parameters.values() if callable(found) else ()
    return {p.name for p in parameters if p.annotation in (str, str | None, "str", "str | None")}


def _texts(content: Any, key: Any) -> Iterator[tuple[Any, str]]:
    """All texts in nested dicts, lists, tuples and dataclasses, with their keys, and keys that are no identifiers."""
    # The command line takes keys apart at their dots: `guidance.class_path` is a class path too.
    if is_dataclass(content):
        content = vars(content)
    if isinstance(content, dict):
        for inner, value in content.items():
            if isinstance(inner, str) and not inner.isidentifier():
                yield key, inner
            if inner not in _CLASS_KEYS:
                yield from _texts(value, inner)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _texts(item, key)
    elif isinstance(content, str):
        yield key, content


def _is_settings(text: str) -> bool:
    """Whether YAML reads a text as a dictionary or a list."""
    try:
        return isinstance(yaml.safe_load(text), (dict, list))
    except (yaml.YAMLError, ValueError, RecursionError):
        return any(mark in text for mark in "{[:\n")


def _names_settings(text: str) -> bool:
    """Whether a text is the path of a class outside this package, or the name of a file."""
    text = text.strip()
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text):
        return not _is_own(text)
    try:
        return Path(text).is_file()
    except (ValueError, OSError):
        return False
