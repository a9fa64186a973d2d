"""Finding the layer whose feature maps an explanation weighs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from labn.inference import logits_of

_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@contextmanager
def watching(modules: dict[str, nn.Module], see: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `see(name, output)` after every forward of `modules`, in order of completion; hooks go with the block."""
    hooks = [m.register_forward_hook(lambda _m, _a, out, name=name: see(name, out)) for name, m in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`.

    Raises:
        ValueError: there is none; the message lists the nearest names.
    """
    layers = dict(model.named_modules())
    if name not in layers:
        near = difflib.get_close_matches(name, layers, n=5, cutoff=0.3)
        raise ValueError(f"target_layer {name!r} is not a layer of {type(model).__name__}; near it: {', '.join(near)}.")
    return layers[name]


def find_target_layer(model: nn.Module, images: Tensor) -> str:
    """`search_target_layer`, searched once per model."""
    if model not in _found:
        _found[model] = search_target_layer(model, images)
    return _found[model]


def search_target_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the last layer with spatial feature maps (B, K, h, w), h*w > 1, on the way to the logits.

    Pooling layers are passed over, so that a VGG gives its last convolutional features; of several nested modules
    that return the same tensor the outermost is taken.

    Raises:
        ValueError: no layer has spatial feature maps.
    """
    seen: list[tuple[str, Tensor]] = []
    pooled: list[tuple[str, Tensor]] = []
    layers = dict(model.named_modules())

    def see(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1 and output.requires_grad:
            (pooled if isinstance(layers[name], POOLING) else seen).append((name, output))

    with torch.enable_grad(), watching(layers, see):
        logits = logits_of(model(images[:1].detach().requires_grad_()))
    skip = {id(output) for _, output in pooled}
    for name, output in reversed(seen):
        if id(output) in skip or not name:
            continue
        (gradient,) = torch.autograd.grad(logits.sum(), output, retain_graph=True, allow_unused=True)
        if gradient is not None:
            return name
    raise ValueError(f"{type(model).__name__} has no layer with spatial feature maps; name one with target_layer.")
