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
    """

    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None
    module: str
    module_type: str
    shape: torch.Size

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
        outputs: qualified module name -> index of the value that the module returned.
    """

    calls: list[Call]
    logits: int
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


def _works_in_place(call: Call) -> bool:
    name = str(getattr(call.func, "__name__", ""))
    suffixed = name.endswith("_") and not name.endswith("__")
    # `__iadd__` and its relatives; `inplace=True` among the arguments cannot be told from another True.
    return suffixed or name.startswith("__i") or any(arg is True for arg in (*call.args, *call.kwargs.values()))


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
        # Before the call: an in-place function gives its argument a new number.
        references = substitute((tuple(args), kwargs), self._reference)
        result = func(*args, **kwargs)
        values = enumerate(result) if isinstance(result, (tuple, list)) else [(None, result)]
        for item, value in values:
            if isinstance(value, Tensor):
                self._record(func, references, item, value)
        return result

    def _record(self, func: Any, references: Any, item: int | None, value: Tensor) -> None:
        module, kind = self.scopes[-1]
        args, kwargs = references
        call = Call(len(self.calls) + 1, func, args, kwargs, item, module, kind, value.shape)
        if call.inputs:  # a value that does not depend on the images stays a constant
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
    return Recording(recorder.calls, logits, recorder.outputs)
