"""Copies of a model whose weights are randomised layer by layer, from the output towards the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from labn.errors import InputError
from labn.inference.deep_copy import deep_copy, leads_to
from labn.inference.fingerprint import ModelCache

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)

_copies: ModelCache[list[nn.Module]] = ModelCache()


def _fan_in(parameter: Tensor) -> int:
    return max(parameter.numel() // max(len(parameter), 1), 1)


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Values in [-bound, bound), drawn on the CPU in float64 so that every device and dtype gets the same ones."""
    return (2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1) * bound


def _shuffled(parameter: Tensor, generator: torch.Generator) -> Tensor:
    return parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(parameter)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Replace the module's own parameters in place.

    Kernels, matrices and their biases are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default, which does
    not saturate the softmax at any depth. Vectors without a matrix beside them (the scale of a branch) are shuffled. A
    normalisation becomes the identity, because its running statistics belong to the old weights.
    """
    if isinstance(module, NORMS):  # resets running statistics too
        module.reset_parameters()
        return
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
    fans = [_fan_in(parameter) for parameter in own if parameter.ndim > 1]
    for parameter in own:
        # A bias is drawn with the fan-in of the matrix beside it, as in PyTorch's own layers.
        fan_in = _fan_in(parameter) if parameter.ndim > 1 else fans[0] if fans else None
        new = _uniform(parameter, fan_in**-0.5, generator) if fan_in else _shuffled(parameter, generator)
        parameter.copy_(new)


def _layers(model: nn.Module) -> list[str]:
    """Names of the modules with parameters or statistics of their own, the last first."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, NORMS) or next(module.parameters(recurse=False), None) is not None
    ][::-1]


def count_layers(model: nn.Module) -> int:
    """Number of layers that `randomised_copies` randomises one after the other."""
    return len(_layers(model))


def _build(model: nn.Module, seed: int, n_stages: int) -> list[nn.Module]:
    names = _layers(model)
    # One generator runs through all stages, so that the fully randomised copy does not depend on their number.
    generator, copies = torch.Generator().manual_seed(seed), []
    current = model
    with torch.inference_mode(False), torch.no_grad():
        for stage in range(n_stages):
            current = deep_copy(current)
            for name in names[stage * len(names) // n_stages : (stage + 1) * len(names) // n_stages]:
                _randomise(current.get_submodule(name), generator)
            copies.append(current)
    return copies


def randomised_copies(model: nn.Module, seed: int = 0, n_stages: int = 1) -> list[nn.Module]:
    """Copies of `model` whose layers are randomised cumulatively from the last to the first (Adebayo et al. 2018).

    The layers (modules with weights of their own, in order of registration) are divided into `n_stages` groups; the
    k-th copy has the last k groups randomised, the last copy all of them. Its weights do not depend on `n_stages`.

    The copies are cached until the model or its weights change.

    Args:
        model: any module; not changed.
        seed: of the generator.
        n_stages: number of copies, from 1 to the number of layers; each takes the memory of the model.

    Raises:
        InputError: `n_stages` is outside of this range.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> last, both = randomised_copies(model, n_stages=2)
        >>> torch.equal(last[0].weight, model[0].weight), torch.equal(both[0].weight, model[0].weight)
        (True, False)
    """
    layers = max(len(_layers(model)), 1)
    if not 1 <= n_stages <= layers:
        raise InputError(f"n_stages must be from 1 to {layers}, the layers of {type(model).__name__}; got {n_stages}.")
    return _copies.get(
        model,
        (seed, n_stages),
        lambda: _build(model, seed, n_stages),
        # A copy whose functions hold the original would keep it alive.
        keep=lambda copies: not any(leads_to(copied, model) for copied in copies),
    )
