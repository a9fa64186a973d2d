"""A trained network and its preprocessing from a checkpoint alone, without its configuration."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labn.errors import InputError
from labn.io.preprocessing import KEY, Preprocessing
from labn.models.checkpoints import read_checkpoint
from labn.modules.base import ClassificationModule
from labn.modules.ssd import SSD

START_WEIGHTS = ("backbone_ckpt", "ckpt")
"""Arguments that name the file of weights which training begins with."""
ONLY_FOR_TRAINING = ("guidance", *START_WEIGHTS)
"""Arguments that change nothing about a trained network; a file of starting weights may be gone."""


def restore(path: str | Path) -> tuple[nn.Module, Preprocessing | None]:
    """The network of a checkpoint of this command line, in eval mode, and what pictures it expects.

    Args:
        path: `best.ckpt` or `last.ckpt` of a run. It is read as plain data; no code in it runs.

    Returns:
        The network, and its preprocessing (None in a checkpoint that was saved without a data module).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of a classifier of this project.
    """
    content = read_checkpoint(path)
    arguments = dict(content.get("hyper_parameters") or {})
    module, _, name = str(arguments.get("_class_path", "")).rpartition(".")
    found: Any = getattr(importlib.import_module(module), name, None) if _ours(module) else None
    if isinstance(found, type) and issubclass(found, SSD):
        raise InputError(f"{path} holds a detector, which `cli.py test` explains, with callbacks.DetectionCallback.")
    if not (isinstance(found, type) and issubclass(found, ClassificationModule)) or "state_dict" not in content:
        raise InputError(
            f"{path} is no checkpoint of `cli.py fit` with a module of labn.modules; "
            "for other weights give the network's name with --model and the file with --weights."
        )
    plain = {k: v for k, v in arguments.items() if not k.startswith("_") and k not in ONLY_FOR_TRAINING}
    with torch.random.fork_rng(devices=[]):
        trained = found(**plain)
    trained.load_state_dict(content["state_dict"])
    kept = content.get(KEY)
    return trained.network.eval(), None if kept is None else Preprocessing(**kept)


def _ours(module: str) -> bool:
    return module == "labn.modules" or module.startswith("labn.modules.")
