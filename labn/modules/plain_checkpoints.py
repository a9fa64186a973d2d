"""Checkpoints of unknown origin: read without running what they name, and without building what they describe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from labn.errors import InputError
from labn.models.checkpoints import read_checkpoint

_CLASS_KEYS = ("class_path", "_class_path")


class PlainCheckpointIO(TorchCheckpointIO):
    """Lightning's own files, written as ever, but read as tensors and plain data only.

    Lightning leaves the choice to `weights_only`, to an environment variable and to whether the path is an address on
    the network; here there is none.
    """

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, on the CPU; `map_location` and `weights_only` are Lightning's and not asked.

        Raises:
            FileNotFoundError: there is no such local file.
            ValueError: it names code, is damaged, or is no checkpoint of a LightningModule.
        """
        content = read_checkpoint(path)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise InputError(
                f"{path} is no checkpoint of `cli.py fit`; weights alone go to backbone_ckpt or to explain."
            )
        return content


def check_own_classes(path: Any, content: Any, allowed: Collection[str]) -> None:
    """Stop where a checkpoint's hyper-parameters name a class that the command line would import and build.

    Args:
        path: the file, for the message.
        content: what it holds.
        allowed: class paths that the configuration itself names; those of `labn` always are.

    Raises:
        ValueError: they name another one.
    """
    arguments = content.get("hyper_parameters") if isinstance(content, dict) else None
    for name in _class_paths(arguments):
        if not name.startswith("labn.") and name not in allowed:
            raise InputError(
                f"{path} asks for the class {name}, which neither this project nor the configuration names; "
                "if it is yours, name it in the configuration."
            )


def check_same_class(path: Any, content: Any, asked: str | None) -> None:
    """Stop where a checkpoint's module would silently replace the one of the configuration.

    Args:
        path: the file, for the message.
        content: what it holds.
        asked: class path of the configuration's model.

    Raises:
        ValueError: the checkpoint holds a module of another class.
    """
    arguments = content.get("hyper_parameters") if isinstance(content, dict) else None
    held = arguments.get("_class_path") if isinstance(arguments, dict) else None
    if held and asked and str(held).rpartition(".")[2] != str(asked).rpartition(".")[2]:
        raise InputError(
            f"{path} holds a {held}, but the configuration asks for a {asked}; use the configuration that it was "
            "trained with."
        )


def _class_paths(thing: Any) -> Iterator[str]:
    if isinstance(thing, dict):
        for key, value in thing.items():
            if key in _CLASS_KEYS:
                yield str(value)
            yield from _class_paths(value)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _class_paths(item)
