"""Fingerprints of a model: whether it is still the one that a copy, a plan or a result was made from."""

from __future__ import annotations

import hashlib
import itertools
import json
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchmetrics import Metric

PLAIN = (bool, int, float, complex, str, bytes, type(None))

OWNED = frozenset(vars(nn.Module()))
"""What every module has: its tensors, children and hooks, which are looked at one by one, and the training flag, which
does not count, as everything runs in eval mode."""

CONTAINERS = (list, tuple, dict, set, frozenset)

DEPTH = 4
"""Of containers in containers that are looked into; one may hold itself."""

# Names that a module writes itself as it runs, such as the last attention or its gradient: results, no settings.
_written: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class _Identity:
    """Equal to that of the very same object only, also when another one has come to live at its address."""

    __slots__ = ("address", "reference")

    def __init__(self, thing: Any) -> None:
        self.address = id(thing)
        try:
            self.reference: Any = weakref.ref(thing)
        except TypeError:  # some built-in types have no weak references; their addresses have to do
            self.reference = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity) or self.address != other.address:
            return False
        if self.reference is None or other.reference is None:
            return self.reference is other.reference
        mine = self.reference()
        return mine is not None and mine is other.reference()

    def __hash__(self) -> int:
        return hash(self.address)


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors have no counter."""
    return 0 if tensor.is_inference() else tensor._version


def structure_key(model: nn.Module) -> Hashable:
    """Changes whenever a module, one of its hooks or one of its attributes that `forward` may read does.

    Numbers, strings, lists and dictionaries of them count by value, tensors by identity and version, everything else
    (functions, a `forward` of the instance's own) by identity: what changes inside such an object leaves no trace. What
    the model was seen to write itself (`noting_written`) does not count, nor do metrics of torchmetrics.
    """
    return tuple(
        (_Identity(module), type(module), tuple(_hooks(module)), tuple(_settings(module).items()))
        for module in _modules(model)
    )


def state_key(model: nn.Module) -> Hashable:
    """`structure_key`, which also changes whenever a parameter or buffer is replaced or modified in place.

    Changes through `.data` leave no trace.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return structure_key(model), tuple((_Identity(t), t.data_ptr(), version_of(t)) for t in tensors)


@contextmanager
def noting_written(model: nn.Module) -> Iterator[None]:
    """Remember which attributes `model` writes itself as it runs within the block, so that keys leave them out."""
    before = [(module, _settings(module)) for module in _modules(model)]
    yield
    for module, old in before:
        new = _settings(module)
        changed = {name for name in old.keys() | new.keys() if old.get(name, _written) != new.get(name, _written)}
        if changed:
            _written.setdefault(module, set()).update(changed)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if not isinstance(module, Metric))


def _hooks(module: nn.Module) -> list[Hashable]:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return [(key, _Identity(hook)) for registered in hooks for key, hook in registered.items()]


def _settings(module: nn.Module) -> dict[str, Hashable]:
    """Attributes of the module's own, each as something that changes when it does."""
    ignored = _written.get(module, ())
    return {
        name: _fingerprint(value) for name, value in vars(module).items() if name not in OWNED and name not in ignored
    }


def _fingerprint(value: Any, depth: int = DEPTH) -> Hashable:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return _Identity(value), version_of(value)
    if isinstance(value, CONTAINERS) and depth:
        items = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
        inside = [_fingerprint(item, depth - 1) for item in items]
        return type(value), frozenset(inside) if isinstance(value, (set, frozenset)) else tuple(inside)
    return _Identity(value)


def digest(*things: Any) -> str:
    """Twelve hexadecimal digits that depend on the JSON form of `things`."""
    text = json.dumps(things, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Hash of a model's state: names, shapes and values of every parameter and persistent buffer."""
    return state_digest(model.state_dict())


def state_digest(state: Mapping[str, Any]) -> str:
    """`weights_digest` of the model that has this state dict."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        if not isinstance(tensor, Tensor):
            continue
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(_content(tensor))
    return found.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, type and values; no arithmetic, whose last digits depend on the number of threads."""
    return digest(list(tensor.shape), str(tensor.dtype), hashlib.blake2b(_content(tensor)).hexdigest())


def _content(tensor: Tensor) -> bytes:
    # As bytes, because NumPy does not know every type, such as bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def settings_digest(model: nn.Module) -> str:
    """Hash of what a model's state leaves out: every submodule's class and plain public attributes, such as theta."""
    plain = (str, int, float, bool, tuple, type(None))
    return digest(
        [
            (
                name,
                type(module).__qualname__,
                {k: v for k, v in vars(module).items() if _public(k) and type(v) in plain},
            )
            for name, module in model.named_modules()
        ]
    )


def _public(name: str) -> bool:
    return not name.startswith("_") and name != "training"
