"""A second device without hardware: tensors in main memory that refuse to meet those of the CPU, as a GPU's do.

Where no GPU can be had, code that forgets to move a tensor runs all the same. Inside `Elsewhere` a tensor that was
moved to `DEVICE` carries a mark, and PyTorch's functions keep a GPU's rules about it: results carry the mark, an
operand without it is an error unless it is a single number or an index, NumPy cannot read it, and a generator of the
CPU cannot fill it. The arithmetic is the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

DEVICE = torch.device("cuda", 0)
# Not an attribute of the tensors, which would be saved with them.
_THERE = WeakTensorKeyDictionary()
_ASKED: dict[Any, Callable[[bool], Any]] = {
    Tensor.device.__get__: lambda there: DEVICE if there else torch.device("cpu"),
    Tensor.is_cuda.__get__: lambda there: there,
    Tensor.is_cpu.__get__: lambda there: not there,
}
_MOVES = {"to", "type_as", "cpu", "cuda"}
_READS = {"numpy", "__array__"}
# Functions that take tensors of both devices.
_MIXES = {"__getitem__", "__setitem__", "copy_", "__set__", "_has_compatible_shallow_copy_type"}


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether the tensor is on the second device."""
    return tensor in _THERE


def _marked(tensor: Tensor, there: bool) -> Tensor:
    if there:
        _THERE[tensor] = True
    else:
        _THERE.pop(tensor, None)
    return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _device(value: Any) -> torch.device | None:
    """The device that an argument names; None where it is something else."""
    if isinstance(value, torch.device):
        return value
    named = isinstance(value, str) and value.partition(":")[0] in ("cpu", DEVICE.type)
    return torch.device(value) if named else None


_make_subclass = Tensor._make_subclass


def _make_marked_subclass(kind: type[Tensor], data: Tensor, *options: bool) -> Tensor:
    """What makes parameters of tensors, which functions' modes do not see."""
    return _marked(_make_subclass(kind, data, *options), is_elsewhere(data))


class Elsewhere(TorchFunctionMode):
    """While it is entered, `DEVICE` exists."""

    def __init__(self) -> None:
        super().__init__()
        self._patches = [
            patch.object(Tensor, "_make_subclass", staticmethod(_make_marked_subclass)),
            patch.object(torch.cuda, "synchronize", lambda device=None: None),
        ]

    def __enter__(self) -> Elsewhere:
        """Enter the mode."""
        for replacement in self._patches:
            replacement.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave it."""
        super().__exit__(*error)
        for replacement in self._patches:
            replacement.stop()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch under the rules of two devices."""
        kwargs = kwargs or {}
        if function in _ASKED:
            return _ASKED[function](is_elsewhere(args[0]))
        name = getattr(function, "__name__", str(function))
        given = list(_tensors((args, kwargs)))
        there = any(map(is_elsewhere, given))
        if name in _MOVES:
            return self._moved(name, function, args, kwargs)
        if there:
            _check(name, given, kwargs)
        device = _device(kwargs.get("device"))
        if device is not None:
            there, kwargs = device.type == DEVICE.type, {**kwargs, "device": "cpu"}
        result = function(*args, **kwargs)
        if function == Tensor.data.__set__:
            _marked(args[0], is_elsewhere(args[1]))
        known = {id(tensor) for tensor in given}
        for tensor in _tensors(result) if there else ():
            if id(tensor) not in known:
                _marked(tensor, there)
        return result

    def _moved(self, name: str, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`tensor.to` and its like: another type by PyTorch itself, another device by a copy with the mark."""
        tensor, values = args[0], [*args[1:], *kwargs.values()]
        wanted: list[bool] = [is_elsewhere(value) for value in values if isinstance(value, Tensor)]
        wanted += [device.type == DEVICE.type for device in map(_device, values) if device is not None]
        wanted += [name == "cuda"] if name in ("cpu", "cuda") else [is_elsewhere(tensor)]
        result = tensor
        if name not in ("cpu", "cuda"):
            here = [torch.device("cpu") if _device(value) else value for value in args[1:]]
            result = function(tensor, *here, **{k: "cpu" if _device(value) else value for k, value in kwargs.items()})
        if result is tensor and is_elsewhere(tensor) is wanted[0]:
            return tensor
        return _marked(result.clone() if result is tensor else result, wanted[0])


def _check(name: str, given: list[Tensor], kwargs: dict[str, Any]) -> None:
    """Raise what a GPU raises where some of a call's tensors are on it and others are not."""
    if name in _READS:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy.")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'.")
    # What the engine hands to Python during a backward pass is new, without a mark, and on its device.
    if name in _MIXES or torch._C._current_graph_task_id() != -1:
        return
    strays = [tuple(tensor.shape) for tensor in given if tensor.ndim and not is_elsewhere(tensor)]
    if strays:
        raise RuntimeError(f"{name}: expected all tensors to be on {DEVICE}, but found {strays} on cpu.")
