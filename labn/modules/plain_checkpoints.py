"""Checkpoints of unknown origin: reading them without running code, and checking the classes that they name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from labn.errors import InputError
from labn.models.checkpoints import read_checkpoint

_CLASS_KEYS = ("class_path", "_class_path")


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
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise InputError(
                f"{path} is not a checkpoint of `cli.py fit`; pass weights alone as backbone_ckpt, or to `explain`."
            )
        return content


def check_own_classes(path: Any, content: Any, allowed: Collection[str]) -> None:
    """Check the classes in a checkpoint's hyper-parameters, which the command line would import and instantiate.

    Args:
        path: the file, for the message.
        content: the content of the checkpoint.
        allowed: class paths that the configuration names; classes of `labn` are always allowed.

    Raises:
        InputError: the hyper-parameters name another class.
    """
    arguments = content.get("hyper_parameters") if isinstance(content, dict) else None
    for name in _class_paths(arguments):
        if not name.startswith("labn.") and name not in allowed:
            raise InputError(
                f"{path} asks for the class {name}, which neither this project nor the configuration names; "
                "name it in the configuration if it is yours."
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
    """All class paths in nested dicts, lists and tuples."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _CLASS_KEYS:
                yield str(value)
            yield from _class_paths(value)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _class_paths(item)
