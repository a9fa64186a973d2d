"""Deep copies of models, also of those that keep tensors of their last forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
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
    for tensor in _tensors(model):
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a deep copy of the model reaches: in its modules, in containers, and in plain objects."""
    waiting: list[Any] = [model]
    seen: dict[int, Any] = {}  # the things themselves: an address may be taken again by another one
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, dict):
            waiting.extend(thing.values())
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting.extend(thing)
        elif isinstance(thing, types.MethodType):
            waiting.append(thing.__self__)
        if not isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            waiting.extend(getattr(thing, "__dict__", {}).values())
