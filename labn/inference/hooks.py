"""Temporary hooks on the modules of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def recording_calls(model: nn.Module) -> Iterator[list[nn.Module]]:
    """A list that fills with the modules of `model` that run within the block.

    A copy of the model should run none of them. It does where an attribute holds a function bound to the model's own
    layers (its `forward`, wrapped), because `copy.deepcopy` keeps functions as they are.
    """
    heard: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: heard.append(module)) for m in model.modules()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
