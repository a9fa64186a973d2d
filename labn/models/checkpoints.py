"""Start a network from a file: take the tensors that fit, say what was taken, refuse what does not fit at all."""

from __future__ import annotations

import importlib
import itertools
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from labn.errors import InputError, MissingFileError
from labn.models.lambda_networks.layer import LambdaLayer

PREFIXES = re.compile(r"^(?:(?:module|model|network|_orig_mod|feature_extractor|perception_branch)\.)+")
RENAMES = {
    "conv_qkv.weight": "to_qkv.weight",
    "lambda_conv.weight": "position_weight",
    "lambda_conv.bias": "position_bias",
}


@dataclass(frozen=True)
class LoadReport:
    """What `load_backbone` did; printing it gives counts and names, whole modules as `<module>.*`.

    Attributes:
        path: the file.
        taken: names (of the model) of tensors that came from the file.
        fresh: names of tensors that the model kept as they were.
        unused: names (of the file) that went nowhere, with the reason where the model has a tensor of that name.
    """

    path: str
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.taken)} tensors taken, {len(self.fresh)} fresh, {len(self.unused)} unused"]
        taken, fresh = _whole_modules(self.taken, self.fresh), _whole_modules(self.fresh, self.taken)
        for title, names in (("taken", taken), ("fresh", fresh), ("unused", self.unused)):
            lines += [f"  {title}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


def _whole_modules(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The names, those of a module of which nothing is among the others as one `<module>.*`."""
    mixed = {module for name in others for module in _modules(name)}
    short = (next((f"{module}.*" for module in _modules(name) if module not in mixed), name) for name in names)
    return list(dict.fromkeys(short))


def _modules(name: str) -> Iterator[str]:
    """The modules around a tensor, the largest first: `a.b.c` is in `a` and `a.b`."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def load_backbone(model: nn.Module, path: str | Path) -> LoadReport:
    """Copy into `model` every tensor of a file that fits by name and shape, in place.

    Names are compared after `canonical`, so a plain classifier, an attention branch network (whatever its split) and
    this project's Lightning checkpoints can start each other. Values are cast to the model's dtype, so float16 files
    work. A classifier of another size stays fresh. Where a lambda layer stays fresh, so do the running statistics of
    the BatchNorm behind it: they described the output of another layer.

    Args:
        model: a classifier or an `AttentionBranchNetwork`.
        path: `.safetensors`, or a pickle of tensors (`.pt`, `.pth`, `.ckpt`), read with `weights_only`.

    Returns:
        What was taken, what stayed fresh, what was not used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unreadable or of another architecture: less than half of the model's, and less than
            half of the file's, convolution kernels fit.
    """
    own = model.state_dict()
    offered = {canonical(name): (name, _flat(tensor)) for name, tensor in read_tensors(path).items()}
    fits = {
        name: offered[canonical(name)][1]
        for name, tensor in own.items()
        if canonical(name) in offered and offered[canonical(name)][1].shape == tensor.shape
    }
    _check_architecture(path, own, offered, fits)
    for name in _stale_statistics(model, fits):
        fits.pop(name, None)
    model.load_state_dict(fits, strict=False)
    used = {canonical(name) for name in fits}
    shapes = {canonical(name): tuple(tensor.shape) for name, tensor in own.items()}
    unused = tuple(_reason(offered[key], shapes.get(key)) for key in offered if key not in used)
    return LoadReport(str(path), tuple(fits), tuple(name for name in own if name not in fits), unused)


def load_classifier(model: nn.Module, path: str | Path) -> LoadReport:
    """`load_backbone`, where every tensor must fit but those of the last linear layer, which may have other classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor is missing in the file or has another shape; the message names the first and both shapes.
    """
    own = model.state_dict()
    offered = {canonical(name): tuple(_flat(tensor).shape) for name, tensor in read_tensors(path).items()}
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    for name, tensor in own.items():
        # Counters of batches do not enter the function, and many files come without them.
        if name.rpartition(".")[0] in head or name.endswith("num_batches_tracked"):
            continue
        found = offered.get(canonical(name))
        if found is None:
            raise InputError(f"{path} has no tensor for {name}; give weights of this {type(model).__name__}'s depth.")
        if found != tuple(tensor.shape):
            raise InputError(
                f"{path} holds weights of another width: {canonical(name)} is {found}, this {type(model).__name__} "
                f"needs {tuple(tensor.shape)}; name the backbone that the weights were made for."
            )
    return load_backbone(model, path)


def canonical(name: str) -> str:
    """A tensor's name as a plain ResNet would call it: without wrappers, with this project's names for lambda layers.

    Wrappers are those of DDP, `torch.compile`, LightningModules and the two halves of a split backbone; the released
    LABN code calls the lambda layer's tensors `conv_qkv` and `lambda_conv`.
    """
    name = PREFIXES.sub("", name)
    for old, new in RENAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _flat(tensor: Tensor) -> Tensor:
    """A released position window (dim_k, dim_u, 1, r, r), a Conv3d kernel, as this project's (dim_k, dim_u, r, r)."""
    return tensor.squeeze(2) if tensor.ndim == 5 and tensor.shape[2] == 1 else tensor


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file or of a pickle, which may hold them under `state_dict` or `model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely or holds no named tensors.
    """
    content = read_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise InputError(f"{path} holds no named tensors; a state dict or a Lightning checkpoint is needed.")
    return tensors


def read_checkpoint(path: str | Path) -> Any:
    """Everything that a safetensors file or a pickle holds, read as plain data: no code in it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; give a local .safetensors, .pt, .pth or .ckpt file.")
    return _read(path)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(own_data(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} cannot be read as tensors only: {_named_code(path, error)}") from error
    # A file that was made to do harm can end the reader in any way; there is no list of its errors.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as tensors only: {reason}") from error


def _named_code(path: Path, error: Exception) -> str:
    names = ", ".join(sorted(set(_globals_of(path)) - {f"{c.__module__}.{c.__qualname__}" for c in own_data(path)}))
    if names:
        return f"it names code to run ({names}), which is refused; ask for a file of plain tensors."
    # The rest of torch's message advises to read the file without this protection.
    reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return "it is damaged, or no checkpoint of PyTorch" + (f" ({reason[1].rstrip('. ')})." if reason else ".")


def _globals_of(path: Path) -> list[str]:
    """Names beyond PyTorch's own that a checkpoint wants called or built."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, pickle.UnpicklingError):  # an old file that is no archive: nothing to allow
        return []


def own_data(path: Path) -> list[Any]:
    """Dataclasses of this package that a checkpoint names, such as the options of saliency guidance.

    Nothing else of the package: a pickle may call whatever it is allowed to name, with arguments of its own, so that
    a function that writes files must not be among it, nor what a module has merely imported.
    """
    found = []
    for name in _globals_of(path):
        module, _, attribute = name.rpartition(".")
        if module.startswith("labn."):
            try:
                thing = getattr(importlib.import_module(module), attribute, None)
            except ImportError:
                continue
            if isinstance(thing, type) and is_dataclass(thing) and thing.__module__ == module:
                found.append(thing)
    return found


def _check_architecture(
    path: str | Path, own: dict[str, Tensor], offered: dict[str, tuple[str, Tensor]], fits: dict[str, Tensor]
) -> None:
    taken = sum(tensor.ndim >= 4 for tensor in fits.values())
    wanted = min(sum(t.ndim >= 4 for t in own.values()), sum(t.ndim >= 4 for _, t in offered.values()))
    if not fits or taken < wanted / 2:
        raise InputError(
            f"{path} is of another architecture: {taken} of its convolution kernels fit this network, "
            f"at least {max(1, -(-wanted // 2))} are needed."
        )


def _stale_statistics(model: nn.Module, fits: dict[str, Tensor]) -> list[str]:
    stale = []
    for name, module in model.named_modules():
        if isinstance(module, LambdaLayer) and f"{name}.position_weight" not in fits:
            behind = f"{name.rpartition('.')[0]}.bn2"
            stale += [f"{behind}.{s}" for s in ("running_mean", "running_var", "num_batches_tracked")]
    return stale


def _reason(source: tuple[str, Tensor], shape: tuple[int, ...] | None) -> str:
    name, tensor = source
    if shape == tuple(tensor.shape):
        return f"{name} (of another layer's output)"
    return name if shape is None else f"{name} {tuple(tensor.shape)} (fresh: {shape})"
