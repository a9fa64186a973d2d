"""Restoring a trained network and its preprocessing from a checkpoint, without its configuration."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labn.errors import InputError
from labn.io.preprocessing import KEY, Preprocessing
from labn.models.backbones import import_path_of
from labn.models.checkpoints import read_checkpoint
from labn.modules.base import ClassificationModule
from labn.modules.ssd import SSD

WEIGHT_ARGUMENTS = ("backbone_ckpt", "ckpt")
"""Arguments that name the file of weights that training starts from."""
TRAINING_ARGUMENTS = ("guidance", "map_teacher", *WEIGHT_ARGUMENTS)
"""Arguments that do not change a trained network; the file of starting weights may no longer exist."""


def check_own_network(path: Any, arguments: Any, allowed: Collection[str]) -> None:
    """Check that a checkpoint's network is of this project, torchvision or timm, or named by the user.

    Args:
        path: the file, for the message.
        arguments: hyper-parameters of the checkpoint.
        allowed: import paths of networks that the user has named; building any other would run foreign code.

    Raises:
        InputError: the checkpoint names another import path.
    """
    for name in _backbones(arguments):
        if import_path_of(name) is not None and name not in allowed:
            raise InputError(
                f"{path} asks for the network {name}, which is not of this project; if it is yours, name it in the "
                f"configuration (model.init_args.backbone) or with --model {name}."
            )


def _backbones(content: Any) -> Iterator[str]:
    """All texts under the key `backbone`, alone or behind a dot, in nested dicts, lists, tuples and dataclasses."""
    if is_dataclass(content):
        content = vars(content)
    if isinstance(content, dict):
        for key, value in content.items():
            if str(key).rpartition(".")[2] == "backbone" and isinstance(value, str):
                yield value
            yield from _backbones(value)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _backbones(item)


def restore(path: str | Path, allowed: Collection[str] = ()) -> tuple[nn.Module, Preprocessing | None]:
    """Restore the network of a checkpoint, in eval mode, and its preprocessing.

    Args:
        path: `best.ckpt` or `last.ckpt` of a run; it is read as plain data, without running code.
        allowed: import paths of the user's own networks, which the checkpoint may name.

    Returns:
        The network, and its preprocessing (None in a checkpoint that was saved without a data module).

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file is not a checkpoint of a classifier of this project, or its network is not in `allowed`, or
            `allowed` names another one.
    """
    content = read_checkpoint(path)
    stored = content.get("hyper_parameters") if isinstance(content, dict) else None
    arguments = stored if isinstance(stored, dict) else {}
    check_own_network(path, arguments, allowed)
    if allowed and not any(name in allowed for name in _backbones(arguments)):
        raise InputError(f"{path} does not hold the network {', '.join(allowed)}; leave --model out.")
    module, _, name = str(arguments.get("_class_path", "")).rpartition(".")
    module_class: Any = getattr(importlib.import_module(module), name, None) if _in_labn_modules(module) else None
    if isinstance(module_class, type) and issubclass(module_class, SSD):
        raise InputError(
            f"{path} holds a detector; explain it with `cli.py test` and the callback callbacks.DetectionCallback."
        )
    is_classifier = isinstance(module_class, type) and issubclass(module_class, ClassificationModule)
    if not is_classifier or "state_dict" not in content:
        raise InputError(
            f"{path} is not a checkpoint of `cli.py fit` with a module of labn.modules; "
            "for other weights give the network's name with --model and the file with --weights."
        )
    return _built(path, module_class, arguments, content)


def _built(
    path: str | Path, module_class: Any, arguments: dict[str, Any], content: dict[str, Any]
) -> tuple[nn.Module, Preprocessing | None]:
    """The network and the preprocessing of a checkpoint's content; errors name the file."""
    network_arguments = {
        k: v for k, v in arguments.items() if not str(k).startswith("_") and k not in TRAINING_ARGUMENTS
    }
    # Random initial weights are drawn and then replaced; the caller's random numbers stay as they are.
    try:
        with torch.random.fork_rng(devices=[]):
            trained = module_class(**network_arguments)
        trained.load_state_dict(content["state_dict"])
        preprocessing = content.get(KEY)
        return trained.network.eval(), None if preprocessing is None else Preprocessing(**preprocessing)
    except Exception as error:  # arguments from a stranger may make a network fail in any way
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"{path} does not describe a network that can be built here: {reason}.") from error


def _in_labn_modules(module: str) -> bool:
    return module == "labn.modules" or module.startswith("labn.modules.")
