"""Fingerprints of a model, and caches of what was made from it.

Two kinds of fingerprint serve two purposes. Keys (`structure_key`, `version_key`, `state_key`) tell within one process,
quickly and by object identity, whether a model has changed; `ModelCache` compares them. Digests (`weights_digest`,
`settings_digest`) are hashes of contents that are the same in every process; results on disk are filed under them.
"""

from __future__ import annotations

import argparse
import ast
import enum
import functools
import hashlib
import inspect
import itertools
import json
import sys
import textwrap
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")

PLAIN = (bool, int, float, complex, str, bytes, type(None))

OWNED = frozenset(vars(nn.Module()))
"""The attributes of every module. Its tensors, children and hooks are compared one by one; the training flag is
ignored, because everything here runs in eval mode."""

CONTAINERS = (list, tuple, dict, set, frozenset)

DEPTH = 8
"""Levels of nested containers and objects that are compared by value; what lies deeper is compared by identity."""

NAMESPACES = (types.SimpleNamespace, argparse.Namespace)

OPAQUE = sys.stdlib_module_names | {"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"}
"""Packages whose objects are compared by identity: loggers, optimisers and trainers change at every step, and are no
settings of a model."""

ABSENT = ("absent",)  # the key of an attribute that the module does not have


@dataclass
class _Record:
    """What is known of the attributes that one module writes during its own forward.

    Attributes:
        left: name -> key of the value that the forward left. The keys of the module ignore the attribute as long as it
            has this value; another value is a change by the user.
        results: names of tensors and counters that the forward replaced although nobody else had changed them, such as
            the last attention. They are results and not settings, so that the keys ignore them whatever their value.
        changes: how often the forward replaced a value that was not its own: what it left then depends on that value.
        blocks: number of open blocks of `noting_written`.
        entered: name -> key of every attribute when they were last looked at within the outermost open block.
        own: names of the attributes that then had the value that the forward had left.
    """

    left: dict[str, Hashable] = field(default_factory=dict)
    results: set[str] = field(default_factory=set)
    changes: int = 0
    blocks: int = 0
    entered: dict[str, Hashable] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)

    def look(self, module: nn.Module, values: dict[str, Hashable]) -> None:
        """Note the attributes that have changed since the last look, which only the module's forward can have done."""
        # A key of a tensor that is gone equals nothing, itself included, which is what a replaced tensor needs.
        old, names = self.entered, self.entered.keys() | values.keys()
        for name in names:
            if old.get(name, ABSENT) == values.get(name, ABSENT):
                continue
            if name in self.own and _is_result(vars(module).get(name)):
                self.results.add(name)
            elif name not in self.own and name not in self.results:
                self.changes += 1
            self.left[name] = values.get(name, ABSENT)
            self.own.add(name)
        self.entered = values

    def enter(self, values: dict[str, Hashable]) -> None:
        """Begin a block with these values."""
        self.entered = values
        self.own = {name for name, key in self.left.items() if values.get(name, ABSENT) == key}


_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


class _Identity:
    """Compares equal for the very same object only, also when another object has been created at its address."""

    __slots__ = ("address", "reference")

    def __init__(self, thing: Any) -> None:
        self.address = id(thing)
        try:
            self.reference: Any = weakref.ref(thing)
        except TypeError:  # some built-in types have no weak references; the address alone has to do
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
    """The tensor's count of in-place changes; 0 for inference tensors, which keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def structure_key(model: nn.Module) -> Hashable:
    """A key that changes with every module of `model`, every forward hook and every attribute `forward` may read.

    Numbers, strings, arrays, and lists, dictionaries and plain objects of these (a configuration) are compared by
    value, tensors by identity and version, and everything else (functions, a `forward` set on the instance) by
    identity: a change inside such an object does not change the key. Metrics of torchmetrics are ignored, and
    attributes that the model writes itself (`noting_written`), as long as nobody else has changed them.
    """
    return tuple(
        (_Identity(module), type(module), tuple(_hooks(module)), tuple(_settings(module).items()))
        for module in _modules(model)
    )


def state_key(model: nn.Module) -> Hashable:
    """`structure_key`, which also changes when a parameter or buffer is replaced, or any of its values changes.

    The values themselves are read: a write through `.data`, NumPy or a C extension raises no version counter. Reading
    them takes about a tenth of the time of one forward of a ResNet-50 on one image, and less in every call that needs
    more than one forward.
    """
    # Address and version too: a copy shares memory with its original as long as both are the same tensor.
    return version_key(model), tuple(_sums(tensor) for tensor in _tensors(model))


def version_key(model: nn.Module) -> Hashable:
    """`structure_key`, which also changes when a tensor is replaced, or written in a way that torch counts.

    It reads no values and takes about a millisecond. It is for what is said about a model; copies need `state_key`.
    """
    return structure_key(model), tuple((_Identity(t), t.data_ptr(), version_of(t)) for t in _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


COLUMNS = 4093
"""Columns of the table into which `_sums` arranges the values: a prime, so that exchanged filters change the sums."""

BLOCK = 16
"""Rows of the table that are added up before the order of the sums counts."""


def _sums(tensor: Tensor) -> bytes:
    """Column sums, modulo 2^64, of the bytes of a tensor as a table of 64-bit integers; and the bytes that remain.

    Integers are exact: no change is lost in rounding, and NaN is a value like any other. The table is read once, at the
    speed of memory. Between blocks of rows the sums so far are rotated by seven bits, so that rows of different blocks
    cannot be exchanged, nor signs be changed in pairs, without a change of the sums.
    """
    values = tensor.detach()
    if not values.is_contiguous():
        # Another order of the same memory, such as channels_last, is read as it lies there.
        values = values.as_strided((values.numel(),), (1,)) if _is_dense(values) else values.contiguous()
    if values.storage_offset() * values.element_size() % 8:
        # A view into a larger vector may begin between two 64-bit integers, where it cannot be read as such.
        values = values.clone()
    flat = values.reshape(-1).view(torch.uint8)
    table = flat[: flat.numel() // (8 * COLUMNS) * (8 * COLUMNS)]
    rest = flat[table.numel() :].cpu().numpy().tobytes()
    if not table.numel():
        return rest
    sums = np.zeros(COLUMNS, np.uint64)
    for block in _block_sums(table.view(torch.int64).view(-1, COLUMNS)):
        sums = (sums << np.uint64(7) | sums >> np.uint64(57)) + block.view(np.uint64)
    return sums.tobytes() + rest


def _block_sums(rows: Tensor) -> Iterator[np.ndarray]:
    """The sums (COLUMNS,) int64 of every block of rows."""
    if rows.device.type == "cpu":
        # NumPy adds rows in the order of memory; torch.sum is half as fast here.
        table = rows.numpy()
        return (np.add.reduce(table[start : start + BLOCK], axis=0) for start in range(0, len(table), BLOCK))
    return iter(torch.stack([block.sum(0) for block in rows.split(BLOCK)]).cpu().numpy())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the values of a tensor fill a block of memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


@contextmanager
def noting_written(model: nn.Module) -> Iterator[None]:
    """Record which attributes `model` writes on itself during the block, so that the keys ignore what it has written.

    A value that is found changed at the beginning of a later block is the user's and counts as a setting again.
    """
    noted = [(module, _records.setdefault(module, _Record())) for module in _modules(model)]
    for module, record in noted:
        if record.blocks:
            record.look(module, _values(module))
        else:
            record.enter(_values(module))
        record.blocks += 1
    try:
        yield
    finally:
        for module, record in noted:
            record.look(module, _values(module))
            record.blocks -= 1


def note_written(model: nn.Module) -> None:
    """Look, within a block of `noting_written`, at what the forward before this call has written.

    Called between two forwards, it tells what every forward replaces, a result, from what the first one filled in.
    """
    for module in _modules(model):
        record = _records.get(module)
        if record is not None and record.blocks:
            record.look(module, _values(module))


class ModelCache(Generic[T]):
    """Values that were made from a model; each is made again after the model has changed, and dropped with the model.

    Args:
        key_of: the key that tells whether a model has changed, `state_key`, `version_key` or `structure_key`.

    Example:
        >>> cache, layer = ModelCache(), nn.Linear(1, 1, bias=False)
        >>> double = lambda: float(2 * layer.weight.detach())
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> cache.get(layer, "double", double), cache.get(layer, "double", lambda: 0.0)
        (6.0, 6.0)
        >>> _ = nn.init.constant_(layer.weight, 4.0)
        >>> cache.get(layer, "double", double)
        8.0
    """

    def __init__(self, key_of: Callable[[nn.Module], Hashable] = state_key) -> None:
        self._key_of = key_of
        # Weak keys: an entry must not keep its model alive. A value must not refer to the model for the same reason.
        self._entries: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Hashable, T]]] = WeakKeyDictionary()

    def get(
        self,
        model: nn.Module,
        name: Hashable,
        build: Callable[[], T],
        valid_for: Hashable = None,
        keep: Callable[[T], bool] = lambda value: True,
    ) -> T:
        """The value kept under `name`, or `build()` where there is none or the model has changed.

        Args:
            model: the model that the value is made from.
            name: distinguishes the values of one model; each keeps one value.
            build: makes the value.
            valid_for: a further condition: a value that was made for another one is replaced.
            keep: whether a value is kept at all.
        """
        entries = self._entries.setdefault(model, {})
        if name not in entries or entries[name][0] != (self._key_of(model), valid_for):
            value = build()
            if not keep(value):
                entries.pop(name, None)
                return value
            # The key is taken after `build`, which may run the model and so reveal attributes that it writes itself.
            entries[name] = ((self._key_of(model), valid_for), value)
        return entries[name][1]


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    # A metric can only be there where torchmetrics, whose import takes seconds, has been imported.
    torchmetrics = sys.modules.get("torchmetrics")
    metric: Any = getattr(torchmetrics, "Metric", ())
    return (module for module in model.modules() if not isinstance(module, metric))


def _hooks(module: nn.Module) -> list[Hashable]:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return [(key, _Identity(hook)) for registered in hooks for key, hook in registered.items()]


def _values(module: nn.Module) -> dict[str, Hashable]:
    """Attribute name -> a key of its value, for the attributes that the module has beyond those of `nn.Module`."""
    return {name: _value_key(value) for name, value in vars(module).items() if name not in OWNED}


def _settings(module: nn.Module) -> dict[str, Hashable]:
    """`_values` without what the module has written itself."""
    values, record = _values(module), _records.get(module)
    if record is None:
        return values
    if record.blocks:
        record.look(module, values)
    removed = {name: ABSENT for name, key in record.left.items() if key != ABSENT and name not in values}
    settings = {
        name: key
        for name, key in (values | removed).items()
        if name not in record.results and (name not in record.left or record.left[name] != key)
    }
    return {**settings, "": record.changes}


def _is_result(value: Any) -> bool:
    """Whether an attribute is a tensor, a list with tensors, or a whole number, as counters are."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor) or type(value) is int


def _value_key(value: Any, around: tuple[int, ...] = ()) -> Hashable:
    """A key of a value; `around` are the addresses of the containers and objects that it lies in."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return _Identity(value), version_of(value)
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return type(value), value.shape, str(value.dtype), _blake2b([value.tobytes()])
    if id(value) in around:
        return "around", around.index(id(value))
    if len(around) < DEPTH:
        around = (*around, id(value))
        if isinstance(value, CONTAINERS):
            # Keys and values of a dictionary in its order.
            items = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
            inside = [_value_key(item, around) for item in items]
            return type(value), frozenset(inside) if isinstance(value, (set, frozenset)) else tuple(inside)
        if _is_plain_object(value):
            return type(value), tuple((name, _value_key(item, around)) for name, item in _attributes(value).items())
    return _Identity(value)


def _is_plain_object(value: Any) -> bool:
    """Whether an object is nothing but its attributes, such as a configuration."""
    kind = type(value)
    if isinstance(value, NAMESPACES):
        return True
    if isinstance(value, (type, nn.Module, enum.Enum)) or callable(value):
        return False
    return kind.__module__.partition(".")[0] not in OPAQUE and (hasattr(value, "__dict__") or is_dataclass(kind))


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, also of a dataclass with slots."""
    slots = [f.name for f in fields(value)] if is_dataclass(value) else []
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _blake2b(chunks: Iterable[bytes], size: int = 64) -> str:
    """BLAKE2b of `size` bytes of the concatenated chunks, in hexadecimal digits: the only hash of this project."""
    found = hashlib.blake2b(digest_size=size)
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def digest(*things: Any) -> str:
    """Twelve hexadecimal digits of a hash of the JSON form of `things`.

    Example:
        >>> digest("lrp", {"rule": "zplus"}) == digest("lrp", {"rule": "zplus"}), len(digest("lrp"))
        (True, 12)
    """
    return _blake2b([json.dumps(things, sort_keys=True, default=str).encode()], size=6)


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of a hash of names, shapes and values of every parameter and persistent buffer."""
    return state_digest(model.state_dict())


def state_digest(state: Mapping[str, Any]) -> str:
    """`weights_digest` of the model that has this state dict."""
    tensors = ((name, tensor) for name, tensor in sorted(state.items()) if isinstance(tensor, Tensor))
    chunks = ((f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), _content(tensor)) for name, tensor in tensors)
    return _blake2b(itertools.chain.from_iterable(chunks), size=8)


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, dtype and bytes; sums would differ in their last digits with the number of threads."""
    return digest(list(tensor.shape), str(tensor.dtype), _blake2b([_content(tensor)]))


def _content(tensor: Tensor) -> bytes:
    # A view as bytes, because NumPy does not know every dtype, such as bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def settings_digest(model: nn.Module) -> str:
    """Hash of what a state dict leaves out: every submodule's class and plain public attributes, such as theta.

    Attributes that every forward overwrites, such as a count of calls, are results and no settings.
    """
    return digest(
        [(name, type(module).__qualname__, _plain_settings(module)) for name, module in model.named_modules()]
    )


def _plain_settings(module: nn.Module) -> dict[str, Any]:
    plain, results = (str, int, float, bool, tuple, type(None)), overwritten(type(module).forward)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and name not in results and type(value) in plain
    }


@functools.cache
def overwritten(forward: Callable[..., Any]) -> frozenset[str]:
    """Attributes of `self` that the forward method of a module sets whenever it runs, without having read them before.

    The source tells, so that the answer is the same before and after the first forward. Assignments under a condition
    do not count, nor do all those of a method whose source is not available.
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return frozenset()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return frozenset()
    own, read, found = function.args.args[0].arg, set[str](), set[str]()
    for statement in function.body:
        attributes = [n for n in ast.walk(statement) if isinstance(n, ast.Attribute)]
        attributes = [n for n in attributes if isinstance(n.value, ast.Name) and n.value.id == own]
        read |= {n.attr for n in attributes if isinstance(n.ctx, ast.Load)}
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            found |= {n.attr for n in attributes if isinstance(n.ctx, ast.Store)} - read
    return frozenset(found)
