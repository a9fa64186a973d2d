"""Temporary hooks on the modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from labn.errors import InputError

Hooks = Mapping[nn.Module, Callable[..., Any]]


@contextmanager
def temporary_hooks(
    before: Hooks | None = None, after: Hooks | None = None, *, prepend: bool = False
) -> Iterator[None]:
    """Register forward hooks for the duration of a block and remove them on every way out of it.

    Args:
        before: module -> `hook(module, args)`, called before the module's forward (a forward pre-hook).
        after: module -> `hook(module, args, output)`, called after the module's forward; what it returns, if anything,
            replaces the output.
        prepend: run the hooks of `before` ahead of those that are registered already.

    Raises:
        InputError: a module is TorchScript, which has no hooks.

    Example:
        >>> layer, seen = torch.nn.ReLU(), []
        >>> with temporary_hooks(after={layer: lambda module, args, output: seen.append(output)}):
        ...     _ = layer(torch.tensor([-1.0, 2.0]))
        >>> seen, len(layer._forward_hooks)
        ([tensor([0., 2.])], 0)
    """
    for module in (*(before or {}), *(after or {})):
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{module.original_name} is TorchScript, whose layers cannot be watched; pass the module that it was "
                "made from, or take a method that only needs its answers or gradients, such as rise or gradxinput."
            )
    with ExitStack() as handles:
        for module, hook in (before or {}).items():
            handles.callback(module.register_forward_pre_hook(hook, prepend=prepend).remove)
        for module, hook in (after or {}).items():
            handles.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def recording_calls(model: nn.Module) -> Iterator[list[nn.Module]]:
    """A list that fills with the modules of `model` that run within the block.

    A copy of the model must not run any of them. It does so where an attribute holds a function that is bound to the
    model's own layers (its `forward`, wrapped), because `copy.deepcopy` does not copy functions.
    """
    called: list[nn.Module] = []
    with temporary_hooks(before=dict.fromkeys(model.modules(), lambda module, _: called.append(module))):
        yield called
