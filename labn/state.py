"""Whether a model is still the one that something was made from."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors have no counter."""
    return 0 if tensor.is_inference() else tensor._version


def structure_key(model: nn.Module) -> Hashable:
    """Changes whenever a module, one of its hooks, or one of its public numbers, strings and flags does."""
    return tuple(
        (id(module), type(module), tuple(_hooks(module)), tuple(_settings(module))) for module in model.modules()
    )


def state_key(model: nn.Module) -> Hashable:
    """`structure_key`, which also changes whenever a parameter or buffer is replaced or modified in place.

    Changes through `.data` leave no trace.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return structure_key(model), tuple((id(t), t.data_ptr(), version_of(t)) for t in tensors)


def _hooks(module: nn.Module) -> list[Hashable]:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return [(key, id(hook)) for registered in hooks for key, hook in registered.items()]


def _settings(module: nn.Module) -> list[tuple[str, Hashable]]:
    """Public attributes that `forward` may read; the training flag is none, everything runs in eval mode."""
    found = vars(module).items()
    return [(k, v) for k, v in found if _is_plain(v) and not k.startswith("_") and k != "training"]


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
