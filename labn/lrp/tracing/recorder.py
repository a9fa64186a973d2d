"""Recording of the torch functions that a model calls in one forward pass.

The structure comes from the computation, not from the classes that compute it. A user's own residual block, a timm
model, a functional `F.relu` and an in-place `x += shortcut` are therefore recorded alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from labn.errors import InputError
from labn.inference.hooks import temporary_hooks
from labn.lrp.tracing.decompositions import DECOMPOSITIONS


@dataclass(frozen=True)
class Ref:
    """A placeholder in recorded arguments for the value of an earlier call; index 0 is the image batch."""

    index: int


@dataclass
class Call:
    """One recorded torch call whose result depends on the images.

    Attributes:
        index: position in the recording, from 1; 0 is the image batch.
        func: the torch function.
        args, kwargs: its arguments, with a `Ref` in place of every tensor that depends on the images.
        item: position of this value in a tuple result; None where the result is one tensor.
        module, module_type: qualified name and class name of the innermost module that made the call.
        shape: shape of the value.
        floating: whether the value is a floating tensor; indices and masks carry no relevance.
    """

    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None
    module: str
    module_type: str
    shape: torch.Size
    floating: bool = True

    @property
    def operation(self) -> str:
        """Name of the function without leading and trailing underscores, such as `relu`, `add`, `iadd`, `conv2d`.

        The getter of an attribute, such as `mT`, has the attribute's name.
        """
        name = str(getattr(self.func, "__name__", self.func))
        named = getattr(self.func, "__self__", None) if name == "__get__" else self.func
        return str(getattr(named, "__name__", name)).strip("_")

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the values that this call reads, in order, each once."""
        indices: dict[int, None] = {}  # a dict keeps the order
        substitute(
            (self.args, self.kwargs), lambda leaf: indices.setdefault(leaf.index) if isinstance(leaf, Ref) else None
        )
        return tuple(indices)

    @property
    def constants(self) -> list[Tensor]:
        """The floating tensors among the arguments that do not depend on the images."""
        tensors: list[Tensor] = []
        substitute(
            (self.args, self.kwargs),
            lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else None,
        )
        return tensors

    def evaluate(self, values: dict[int, Tensor]) -> Tensor:
        """Run the call again on other values; an in-place call works on copies, because others may read the values."""
        args, kwargs = substitute(
            (self.args, self.kwargs), lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf
        )
        if _works_in_place(self):
            args = substitute(args, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        result = self.func(*args, **kwargs)
        return result if self.item is None else result[self.item]


@dataclass
class Recording:
    """The calls of one forward pass, in order.

    Attributes:
        calls: all calls whose values depend on the images.
        logits: index of the logits.
        count: number of images.
        outputs: qualified module name -> index of the value that the module returned.
    """

    calls: list[Call]
    logits: int
    count: int
    outputs: dict[str, int] = field(default_factory=dict)


def substitute(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists, dicts and slices with `change` applied to every leaf."""
    if isinstance(tree, (tuple, list)):
        items = [substitute(item, change) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: substitute(item, change) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(substitute(bound, change) for bound in (tree.start, tree.stop, tree.step)))
    return change(tree)


def _geometry(view: Tensor) -> tuple[Any, ...]:
    """Shape, strides and offset of a tensor in its memory."""
    return view.shape, view.stride(), view.storage_offset()


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument, by its name."""
    name = str(getattr(func, "__name__", ""))
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _works_in_place(call: Call) -> bool:
    # `__iadd__` and its relatives; `inplace=True` among the arguments cannot be told from another True.
    return _writes(call.func) or any(arg is True for arg in (*call.args, *call.kwargs.values()))


# New tensors of which only shape, dtype or device is taken from an argument: their values are constants.
_SHAPE_ONLY = {
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
    "zeros_like", "ones_like", "full_like", "empty_like",
}  # fmt: skip


def written(base: Tensor, position: Any, value: Any) -> Tensor:
    """A copy of `base` after `base[position] = value`."""
    changed = base.clone()
    changed[position] = value
    return changed


def rewritten(base: Tensor, view: Tensor, shape: torch.Size, strides: Any, geometry: Any) -> Tensor:
    """A copy of `base` in which the elements of one of its views have new values.

    Args:
        base, view: the earlier values, and the new values of the view.
        shape, strides: shape and strides of the base when the view was taken.
        geometry: shape, strides and offset of the view in the base's memory.
    """
    copy = torch.empty_strided(shape, strides, dtype=base.dtype, device=base.device).copy_(base)
    copy.as_strided(*geometry).copy_(view)
    return copy


def reviewed(base: Tensor, shape: torch.Size, strides: Any, geometry: Any) -> Tensor:
    """A view of `base` with the given geometry in the memory that the base had; arguments as for `rewritten`."""
    return torch.empty_strided(shape, strides, dtype=base.dtype, device=base.device).copy_(base).as_strided(*geometry)


class _Recorder(TorchFunctionMode):
    """Numbers every tensor that depends on the images, without keeping tensors alive that the model frees."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.scopes: list[tuple[str, str]] = [("", "")]
        self.outputs: dict[str, int] = {}
        # By identity and weakly: a tensor that the model frees leaves the table, and its address may be used again.
        self._indices = WeakTensorKeyDictionary()
        self._indices[images] = 0

    def index_of(self, leaf: Any) -> int | None:
        return self._indices.get(leaf) if isinstance(leaf, Tensor) else None

    def _reference(self, leaf: Any) -> Any:
        index = self.index_of(leaf)
        if index is not None:
            return Ref(index)
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fits, steps = DECOMPOSITIONS.get(func, (None, None))
        if fits is not None and steps is not None and fits(*args, **kwargs):
            with self:  # the steps are recorded in place of the call
                return steps(*args, **kwargs)
        # Before the call: an in-place function gives its argument a new number.
        references = substitute((tuple(args), kwargs), self._reference)
        if func is Tensor.__setitem__:
            return self._write(args, references[0])
        first, version = self._version_of(args)
        if isinstance(first, Tensor) and _writes(func) and isinstance(references[0][0], Tensor):
            references = ((first.detach().clone(), *references[0][1:]), references[1])  # a constant, before the change
        result = func(*args, **kwargs)
        if str(getattr(func, "__name__", "")) in _SHAPE_ONLY:
            return result
        values = enumerate(result) if isinstance(result, (tuple, list)) else [(None, result)]
        for item, value in values:
            if isinstance(value, Tensor):
                self._record(func, references, item, value)
        if result is first and self._version_of(args)[1] != version and self.index_of(first) is not None:
            self._renew_views(first)
        return result

    @staticmethod
    def _version_of(args: Any) -> tuple[Any, int]:
        """The first argument, which an in-place function changes, and its version counter."""
        first = args[0] if args else None
        return first, first._version if isinstance(first, Tensor) and not first.is_inference() else 0

    def _record(self, func: Any, references: Any, item: int | None, value: Tensor) -> None:
        module, kind = self.scopes[-1]
        args, kwargs = references
        floating = value.is_floating_point()
        call = Call(len(self.calls) + 1, func, args, kwargs, item, module, kind, value.shape, floating)
        if call.inputs:  # a value that does not depend on the images stays a constant
            self.calls.append(call)
            self._indices[value] = call.index

    def _write(self, args: Any, references: Any) -> None:
        """Record `base[position] = value` as a new value of the base."""
        base, before = args[0], references[0]
        if isinstance(before, Tensor):  # the constant that is written on
            before = before.clone()
        Tensor.__setitem__(*args)
        self._record(written, ((before, *references[1:]), {}), None, base)
        if self.index_of(base) is not None:
            self._renew_views(base)

    def _renew_views(self, changed: Tensor) -> None:
        """Record new values of the tensors that share memory with one that was written on: its base and its views."""
        base = changed if changed._base is None else changed._base
        address = base.untyped_storage().data_ptr()
        views = [t for t in self._indices if t is not changed and t.untyped_storage().data_ptr() == address]
        if base is not changed and (views or base not in self._indices):
            old = Ref(self._indices[base]) if base in self._indices else base.detach().clone()
            layout = (base.shape, base.stride(), _geometry(changed))
            self._record_again(rewritten, (old, Ref(self._indices[changed]), *layout), base)
        for view in views:
            if view is not base:
                layout = (base.shape, base.stride(), _geometry(view))
                self._record_again(reviewed, (Ref(self._indices[base]), *layout), view)

    def _record_again(self, func: Any, args: Any, value: Tensor) -> None:
        module, kind = self.scopes[-1]
        call = Call(len(self.calls) + 1, func, args, {}, None, module, kind, value.shape, value.is_floating_point())
        self.calls.append(call)
        self._indices[value] = call.index

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.scopes.append((name, type(module).__name__))

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.scopes.pop()
        index = self.index_of(output)
        if index is not None:
            self.outputs[name] = index


@contextmanager
def _watching(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder, within the block, which module is running."""
    modules = list(model.named_modules())
    enter = {module: partial(recorder.enter, name) for name, module in modules}
    leave = {module: partial(recorder.leave, name) for name, module in modules}
    # Ahead of the model's own pre-hooks, whose operations then belong to the module that they are registered on.
    with temporary_hooks(before=enter, after=leave, prepend=True):
        yield


def record(model: nn.Module, images: Tensor, read_logits: Callable[[Any], Tensor]) -> Recording:
    """Record the calls of one forward pass without gradients.

    Tensors that do not depend on the images (weights, masks made from weights) are constants of the recording.

    Args:
        model: any module.
        images: (B, C, H, W).
        read_logits: the model's output -> logits (B, K).

    Raises:
        InputError: the logits do not depend on the images through torch functions.
    """
    # A clone: models that work in place on their input must not change the caller's images.
    images = images.detach().clone()
    recorder = _Recorder(images)
    with torch.no_grad(), _watching(model, recorder):
        with recorder:
            output = read_logits(model(images))  # recorded too: a detector's logits are concatenated from its heads
        logits = recorder.index_of(output)
    if not logits:
        raise InputError(
            f"The logits of {type(model).__name__} do not depend on the images through visible torch functions."
        )
    return Recording(recorder.calls, logits, len(images), recorder.outputs)
