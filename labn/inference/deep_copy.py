"""Deep copies of models, also of those that keep tensors of their last forward."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M, memo: dict[int, Any] | None = None) -> M:
    """Copy a model with `copy.deepcopy`, also one that keeps results of a forward with gradients, as feature maps are.

    Torch refuses to copy a tensor that belongs to a graph. The copy gets its values without the graph, which leads to
    the weights of the original.

    Args:
        model: not changed.
        memo: address of a thing -> what stands for it in the copy, as for `copy.deepcopy`.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer.last = layer.weight * 2
        >>> copied = deep_copy(layer)
        >>> bool(copied.last == layer.last), copied.last.requires_grad
        (True, False)
    """
    memo = {} if memo is None else memo
    for tensor in _reached_from(model):
        if isinstance(tensor, Tensor) and not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def leads_to(copied: nn.Module, model: nn.Module) -> bool:
    """Whether something in a copy holds the original model or a part of it.

    `copy.deepcopy` does not copy functions: a lambda or a hook in the copy still holds what its closure holds. Such a
    copy keeps the original alive.

    Example:
        >>> def linear():
        ...     layer = nn.Linear(1, 1)
        ...     layer.twice = lambda x: 2 * layer(x)
        ...     return layer
        >>> layer = linear()
        >>> leads_to(copy.deepcopy(layer), layer)
        True
    """
    parts = {id(module) for module in model.modules()}
    return any(id(thing) in parts for thing in _reached_from(copied, closures=True))


def _reached_from(model: nn.Module, closures: bool = False) -> Iterator[Any]:
    """What a deep copy of the model reaches: modules, containers, plain objects and tensors; with `closures`, also what
    its functions hold."""
    waiting: list[Any] = [model]
    seen: dict[int, Any] = {}  # the things themselves: an address may be taken again by another one
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (str, int, float, type, types.ModuleType)):
            continue
        seen[id(thing)] = thing
        yield thing
        waiting.extend(_inside(thing, closures))


def _inside(thing: Any, closures: bool) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from thing
    elif isinstance(thing, types.MethodType):
        yield thing.__self__
    elif closures and isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif closures and isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # a cell that is not filled yet
                yield cell.cell_contents
        yield from thing.__defaults__ or ()
    if not isinstance(thing, types.FunctionType):
        yield from getattr(thing, "__dict__", {}).values()
