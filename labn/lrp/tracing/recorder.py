"""Record which operations a model runs, by watching every torch function of one forward pass.

The structure is taken from what is computed, not from the classes that compute it: a user's copy of a residual
block, a timm model, a functional `F.relu` and an in-place `x += shortcut` all look the same here.
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
    """Stands in recorded arguments for the value of an earlier operation (0 is the image batch)."""

    index: int


@dataclass
class Call:
    """One recorded torch call whose result depends on the images.

    Attributes:
        index: position in the recording; 0 is the image batch itself.
        func: the torch function, its arguments with `Ref` in place of tensors that depend on the images.
        item: which element of a tuple result this is; None where the result is one tensor.
        module: qualified name of the innermost module that ran it, and its class name.
        shape: shape of the result.
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
        """Name of the function without in-place and dunder underscores, such as `relu`, `add`, `iadd`, `conv2d`; of an
        attribute such as `mT` its own name.
        """
        name = str(getattr(self.func, "__name__", self.func))
        named = getattr(self.func, "__self__", None) if name == "__get__" else self.func
        return str(getattr(named, "__name__", name)).strip("_")

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the operations whose values this one reads, in order, each once."""
        found: dict[int, None] = {}
        substitute(
            (self.args, self.kwargs), lambda leaf: found.setdefault(leaf.index) if isinstance(leaf, Ref) else None
        )
        return tuple(found)

    def evaluate(self, values: dict[int, Tensor]) -> Tensor:
        """Run the call again on other values, never in place on a value that others may read."""
        args, kwargs = substitute(
            (self.args, self.kwargs), lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf
        )
        if _works_in_place(self):
            args = substitute(args, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        result = self.func(*args, **kwargs)
        return result if self.item is None else result[self.item]


@dataclass
class Recording:
    """The calls of one forward pass, in order, which one gave the logits, and which one each module returned."""

    calls: list[Call]
    logits: int
    outputs: dict[str, int] = field(default_factory=dict)


def substitute(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists, dicts and slices with `change` applied to every leaf."""
    if isinstance(tree, (tuple, list)):
        parts = [substitute(part, change) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    if isinstance(tree, dict):
        return {key: substitute(part, change) for key, part in tree.items()}
    if isinstance(tree, slice):
        return slice(*(substitute(part, change) for part in (tree.start, tree.stop, tree.step)))
    return change(tree)


def _works_in_place(call: Call) -> bool:
    name = str(getattr(call.func, "__name__", ""))
    suffixed = name.endswith("_") and not name.endswith("__")
    return suffixed or name.startswith("__i") or any(arg is True for arg in (*call.args, *call.kwargs.values()))


class _Recorder(TorchFunctionMode):
    """Numbers every tensor that depends on the images; keeps no tensor alive that the model lets go of."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.scopes: list[tuple[str, str]] = [("", "")]
        self.outputs: dict[str, int] = {}
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
        references = substitute((tuple(args), kwargs), self._reference)
        result = func(*args, **kwargs)
        parts = enumerate(result) if isinstance(result, (tuple, list)) else [(None, result)]
        for item, part in parts:
            if isinstance(part, Tensor):
                self._note(func, references, item, part)
        return result

    def _note(self, func: Any, references: Any, item: int | None, part: Tensor) -> None:
        module, kind = self.scopes[-1]
        args, kwargs = references
        call = Call(len(self.calls) + 1, func, args, kwargs, item, module, kind, part.shape)
        if call.inputs:
            self.calls.append(call)
            self._indices[part] = call.index

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.scopes.append((name, type(module).__name__))

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.scopes.pop()
        index = self.index_of(output)
        if index is not None:
            self.outputs[name] = index


@contextmanager
def _watching(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which module is running."""
    modules = list(model.named_modules())
    enter = {module: partial(recorder.enter, name) for name, module in modules}
    leave = {module: partial(recorder.leave, name) for name, module in modules}
    # Ahead of the model's own pre-hooks, whose operations then belong to the module that they are registered on.
    with temporary_hooks(before=enter, after=leave, prepend=True):
        yield


def record(model: nn.Module, images: Tensor, rows: Callable[[Any], Tensor]) -> Recording:
    """Run `model` once on `images` (B, C, H, W) without gradients and write down the calls that lead to the logits.

    `rows` makes them, (B, K), of the model's output.

    Constants that do not depend on the images (weights, masks made from weights) are kept by reference.

    Raises:
        ValueError: the logits do not come from the images through torch functions that can be seen.
    """
    images = images.detach().clone()
    recorder = _Recorder(images)
    with torch.no_grad(), _watching(model, recorder):
        with recorder:
            output = rows(model(images))  # which may have to be put together from the parts of an output
        logits = recorder.index_of(output)
    if not logits:
        raise InputError(
            f"The logits of {type(model).__name__} do not depend on the images through visible torch functions."
        )
    return Recording(recorder.calls, logits, recorder.outputs)
