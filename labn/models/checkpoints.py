"""Load weights into a network from a file: tensors that fit are loaded and reported, other architectures raise."""

from __future__ import annotations

import importlib
import itertools
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from labn.errors import InputError, MissingFileError
from labn.models.lambda_networks.layer import LambdaLayer

# Prefixes of tensor names from DDP, `torch.compile`, LightningModules, and the halves of an attention branch network.
PREFIXES = re.compile(r"^(?:(?:module|model|network|_orig_mod|feature_extractor|perception_branch)\.)+")
COUNTER = "num_batches_tracked"
"""Last part of the name of BatchNorm's counter of batches, which does not change the output."""
SHOWN = 3
"""Number of tensors loaded by their order that a report names."""
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "params", "module")
"""Usual keys of a state dict inside a checkpoint, the first one first."""
MOST_LEVELS = 4
"""Dicts inside each other, the innermost of which is the state dict."""
LARGEST_REPEATED = 2**26
"""Bytes that a tensor may occupy in memory without occupying them in its file, as an expanded buffer does."""
# Names of the lambda layer's tensors in the released LABN code -> names in this project.
RENAMES = {
    "conv_qkv.weight": "to_qkv.weight",
    "lambda_conv.weight": "position_weight",
    "lambda_conv.bias": "position_bias",
}


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_backbone`. Its text gives counts and names; a whole module is written as `<module>.*`.

    Attributes:
        path: the file.
        taken: names, in the model, of tensors that were loaded from the file.
        fresh: names, in the model, of tensors that were not changed.
        unused: names, in the file, of tensors that were not loaded, with the reason where the model has a tensor of
            that name.
        renamed: (name in the file, name in the model) of tensors that were loaded by their order.

    Example:
        >>> print(LoadReport("a.pt", taken=("conv.weight",), fresh=("fc.bias", "fc.weight"), unused=()))
        a.pt: 1 tensors taken, 2 fresh, 0 unused
          taken: conv.*
          fresh: fc.*
    """

    path: str
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        # Counters of batches are left out: they do not change the output, and split modules into single tensors.
        taken, fresh = ([n for n in names if not n.endswith(COUNTER)] for names in (self.taken, self.fresh))
        lines = [f"{self.path}: {len(taken)} tensors taken, {len(fresh)} fresh, {len(self.unused)} unused"]
        taken, fresh = _whole_modules(taken, fresh), _whole_modules(fresh, taken)
        for title, names in (("taken", taken), ("fresh", fresh), ("unused", self.unused)):
            lines += [f"  {title}: {_listed(names)}"] if names else []
        if self.renamed:
            pairs = [f"{source} -> {target}" for source, target in self.renamed[:SHOWN]]
            pairs += ["..."] if len(self.renamed) > SHOWN else []
            lines.append(f"  by order, because the names differ but all shapes agree: {', '.join(pairs)}")
        return "\n".join(lines)


def _listed(names: Sequence[str], most: int = 12) -> str:
    """The first names, and the number of the others."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _whole_modules(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The names, where all names of a module without any tensor among `others` become one `<module>.*`."""
    mixed = {module for name in others for module in _enclosing_modules(name)}
    short = (
        next((f"{module}.*" for module in _enclosing_modules(name) if module not in mixed), name) for name in names
    )
    return list(dict.fromkeys(short))


def _enclosing_modules(name: str) -> Iterator[str]:
    """Names of the modules that contain a tensor, the outermost first: `a` and `a.b` for `a.b.c`."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def load_backbone(model: nn.Module, path: str | Path) -> LoadReport:
    """Copy every tensor of a file that fits by name and shape into `model`, in place.

    Names are compared after `canonical`, so that plain classifiers, attention branch networks with any split, and
    Lightning checkpoints of this project can be loaded into each other. Values are cast to the model's dtype. A
    classifier layer of another size is not loaded. A name in front of all names of the file, such as `net.`, is taken
    away if the model does not have it. A pickle without any name of the model's is read in order, if it has as many
    tensors and all shapes but the classifier's agree, one by one; `LoadReport.renamed` names them.

    Args:
        model: a classifier or an `AttentionBranchNetwork`.
        path: a `.safetensors` file, or a pickle of tensors (`.pt`, `.pth`, `.ckpt`), which is read with `weights_only`.

    Returns:
        Names of the tensors that were loaded, not changed, and not used.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file is unreadable, or of another architecture: fewer than half of the model's, and fewer than
            half of the file's, convolution kernels fit.

    Example:
        >>> import tempfile
        >>> small, large = nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Sequential(nn.Conv2d(3, 2, 1), nn.Linear(2, 5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(small.state_dict(), f"{folder}/weights.pt")
        ...     report = load_backbone(large, f"{folder}/weights.pt")
        >>> report.taken, report.fresh
        (('0.weight', '0.bias'), ('1.weight', '1.bias'))
    """
    own = model.state_dict()
    tensors = tensors_for(model, path)
    available = {canonical(name): (name, _without_depth(tensor)) for name, tensor in tensors.items()}
    # Files of safetensors are sorted by name.
    if Path(path).suffix != ".safetensors" and (ordered := _in_order(own, tensors, _classifier(model))):
        model.load_state_dict({target: tensors[source] for source, target in ordered}, strict=False)
        sources, taken = ({pair[side] for pair in ordered} for side in (0, 1))
        fresh = tuple(name for name in own if name not in taken)
        unused = tuple(name for name in tensors if name not in sources and not name.endswith(COUNTER))
        return LoadReport(str(path), tuple(target for _, target in ordered), fresh, unused, tuple(ordered))
    fits = {
        name: available[canonical(name)][1]
        for name, tensor in own.items()
        if canonical(name) in available and available[canonical(name)][1].shape == tensor.shape
    }
    _check_architecture(path, own, available, fits)
    for name in _stale_statistics(model, fits):
        fits.pop(name, None)
    model.load_state_dict(fits, strict=False)
    used = {canonical(name) for name in fits}
    shapes = {canonical(name): tuple(tensor.shape) for name, tensor in own.items()}
    unused = tuple(_unused_entry(available[key], shapes.get(key)) for key in available if key not in used)
    return LoadReport(str(path), tuple(fits), tuple(name for name in own if name not in fits), unused)


def load_classifier(model: nn.Module, path: str | Path) -> LoadReport:
    """Load weights with `load_backbone` where all tensors but those of the last linear layer must fit.

    Raises:
        MissingFileError: the file does not exist.
        InputError: a tensor is missing in the file or has another shape; the message names the first one.
    """
    own = model.state_dict()
    tensors = tensors_for(model, path)
    available = {canonical(name): tuple(_without_depth(tensor).shape) for name, tensor in tensors.items()}
    for name, tensor in own.items():
        # Many files lack the counters.
        if name.rpartition(".")[0] == _classifier(model) or name.endswith(COUNTER):
            continue
        shape = available.get(canonical(name))
        if shape is None:
            raise InputError(f"{path} has no tensor for {name}; give weights of this {type(model).__name__}'s depth.")
        if shape != tuple(tensor.shape):
            raise InputError(
                f"{path} holds weights of another width: {canonical(name)} is {shape}, this {type(model).__name__} "
                f"needs {tuple(tensor.shape)}; set backbone to the network that the weights were made for."
            )
    return load_backbone(model, path)


def misfit(own: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """The first reason why the stored tensors cannot be loaded into a network, as the end of a sentence.

    Args:
        own: the state dict of the network.
        stored: the state dict of the file.

    Example:
        >>> misfit({"fc.weight": torch.zeros(2, 4)}, {"fc.weight": torch.zeros(3, 4)})
        'fc.weight has the shape (3, 4) and must have (2, 4)'
    """
    for name in (name for name in own if name in stored):
        shapes = [tuple(getattr(tensors[name], "shape", ())) for tensors in (stored, own)]
        if not isinstance(stored[name], Tensor):
            return f"{name} is no tensor"
        if shapes[0] != shapes[1]:
            return f"{name} has the shape {shapes[0]} and must have {shapes[1]}"
    missing, unknown = [n for n in own if n not in stored], [n for n in stored if n not in own]
    if missing:
        return f"{len(missing)} of {len(own)} tensors are missing, such as {missing[0]}"
    return f"{len(unknown)} tensors are not of this network, such as {unknown[0]}" if unknown else "a tensor is damaged"


def canonical(name: str) -> str:
    """A tensor's name in a plain ResNet: without the prefixes of wrappers, and with this project's lambda layer names.

    Example:
        >>> canonical("network.feature_extractor.layer1.0.lambda_conv.weight")
        'layer1.0.position_weight'
    """
    name = PREFIXES.sub("", name)
    for old, new in RENAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _without_depth(tensor: Tensor) -> Tensor:
    """A position kernel (dim_k, dim_u, 1, r, r) of the released code's Conv3d as (dim_k, dim_u, r, r)."""
    return tensor.squeeze(2) if tensor.ndim == 5 and tensor.shape[2] == 1 else tensor


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors file, or of a pickle, where they may lie under one of `CONTAINERS`.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file cannot be read safely, has no named tensors, or has several state dicts under other keys.
    """
    content = read_checkpoint(path)
    tensors = _named_tensors(content)
    for _ in range(MOST_LEVELS):
        inner = _state_dicts(content, len(tensors)) if isinstance(content, dict) else {}
        if not inner:
            break
        usual = [key for key in CONTAINERS if key in inner]
        if not usual and len(inner) > 1:
            raise InputError(f"{path} holds several state dicts, {', '.join(inner)}; save one of them alone.")
        content = inner[(usual or list(inner))[0]]
        tensors = _named_tensors(content)
    if not tensors:
        raise InputError(f"{path} holds no named tensors; a state dict or a Lightning checkpoint is needed.")
    return tensors


def tensors_for(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """As `read_tensors`, without a first part that all names of the file share and no name of the model begins with."""
    tensors, firsts = read_tensors(path), {canonical(name).partition(".")[0] for name in model.state_dict()}
    while len(shared := {name.partition(".")[0] for name in tensors}) == 1 and not shared & firsts:
        shorter = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
        if "" in shorter:
            break
        tensors = shorter
    return tensors


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a dict that have a text as their name."""
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def _state_dicts(content: dict[Any, Any], more_than: int) -> dict[str, Any]:
    """The dicts among the values that hold, directly or one level below, more named tensors than so many.

    Dicts with less than half of the tensors of the largest one are left out: metrics, or averages of an optimiser.
    """
    inner = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, dict)}
    counts = {key: max(map(len, map(_named_tensors, [value, *value.values()]))) for key, value in inner.items()}
    least = max([more_than + 1, *(count / 2 for count in counts.values())])
    return {key: inner[key] for key, count in counts.items() if count >= least}


def read_checkpoint(path: str | Path) -> Any:
    """Read the content of a safetensors file or a pickle as plain data, without running code that it names.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file cannot be read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise _missing(path)
    return _read(path)


def _missing(path: Path) -> MissingFileError:
    return MissingFileError(f"{path} does not exist; give a local .safetensors, .pt, .pth or .ckpt file.")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_uncompressed(path)
        with torch.serialization.safe_globals(own_dataclasses(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} cannot be read as tensors only: {_unsafe_content(path, error)}") from error
    except FileNotFoundError as error:  # another command has moved it meanwhile
        raise _missing(path) from error
    # torch and safetensors raise many kinds of errors for damaged or hostile files.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as tensors only: {reason}") from error
    _check_sizes(path, content)
    return content


def _check_uncompressed(path: Path) -> None:
    """Raise InputError for an archive with compressed entries, which could unfold into any size.

    PyTorch writes them uncompressed.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        name = next((e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED), None)
    if name is not None:
        raise InputError(f"its entry {name} is compressed, which PyTorch never does; save it with torch.save.")


def _check_sizes(path: Path, content: Any) -> None:
    """Raise InputError for a tensor that repeats a small storage into a large tensor; a copy would fill the memory."""
    pending, seen = [content], set()
    while pending:
        item = pending.pop()
        # A pickle may hold a dict that contains itself.
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item
        elif isinstance(item, Tensor) and item.layout is torch.strided:
            claimed, stored = item.numel() * item.element_size(), item.untyped_storage().nbytes()
            if claimed > max(stored, LARGEST_REPEATED):
                raise InputError(
                    f"{path} has a tensor of shape {tuple(item.shape)} in a storage of {stored} bytes; save tensors "
                    "with all of their values (`.contiguous()`)."
                )


def _unsafe_content(path: Path, error: Exception) -> str:
    names = ", ".join(
        sorted(set(_foreign_globals(path)) - {f"{c.__module__}.{c.__qualname__}" for c in own_dataclasses(path)})
    )
    if names:
        return f"it names code to run ({names}), which is refused; save plain tensors, as `model.state_dict()`."
    # The rest of torch's message advises reading the file without `weights_only`, which would run its code.
    reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return "it is damaged, or not a checkpoint of PyTorch" + (f" ({reason[1].rstrip('. ')})." if reason else ".")


def _foreign_globals(path: Path) -> list[str]:
    """Names of functions and classes in a checkpoint that PyTorch does not allow by default."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, pickle.UnpicklingError):  # a file in PyTorch's old format, which is not a zip archive
        return []


def own_dataclasses(path: Path) -> list[Any]:
    """Dataclasses of this package that a checkpoint names, such as the options of saliency guidance."""
    # Only dataclasses, and only in the module that defines them: a pickle can call every name that it is allowed to
    # use with any arguments, so functions (which may write files) and imported names must stay forbidden.
    classes = []
    for name in _foreign_globals(path):
        module, _, attribute = name.rpartition(".")
        if module.startswith("labn."):
            try:
                value = getattr(importlib.import_module(module), attribute, None)
            except ImportError:
                continue
            if isinstance(value, type) and is_dataclass(value) and value.__module__ == module:
                classes.append(value)
    return classes


def _classifier(model: nn.Module) -> str | None:
    """The name of the last linear layer."""
    return next((name for name, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), None)


def _in_order(
    own: dict[str, Tensor], tensors: dict[str, Tensor], classifier: str | None = None
) -> list[tuple[str, str]]:
    """Pairs (name in the file, name in the model) where no tensor fits by name, but all fit by order and shape.

    BatchNorm's counters of batches are left out, because many files lack them, and so is a classifier for another
    number of classes.
    """
    sources, targets = ([name for name in names if not name.endswith(COUNTER)] for names in (tensors, own))
    by_name = {canonical(name) for name in sources} & {canonical(name) for name in targets}
    if len(sources) != len(targets) or by_name:
        return []
    pairs = list(zip(sources, targets))
    fits = [(a, b) for a, b in pairs if tensors[a].shape == own[b].shape]
    # A classifier for other classes has as many inputs.
    others = [(tensors[a].shape[1:], own[b].shape[1:], b.rpartition(".")[0]) for a, b in pairs if (a, b) not in fits]
    return fits if all(one == other and layer == classifier for one, other, layer in others) else []


def _check_architecture(
    path: str | Path, own: dict[str, Tensor], available: dict[str, tuple[str, Tensor]], fits: dict[str, Tensor]
) -> None:
    taken = sum(tensor.ndim >= 4 for tensor in fits.values())
    wanted = min(sum(t.ndim >= 4 for t in own.values()), sum(t.ndim >= 4 for _, t in available.values()))
    if not fits or taken < wanted / 2:
        raise InputError(
            f"{path} is of another architecture: {taken} of its convolution kernels fit this network, "
            f"at least {max(1, -(-wanted // 2))} are needed."
        )


def _stale_statistics(model: nn.Module, fits: dict[str, Tensor]) -> list[str]:
    """Names of BatchNorm statistics in the file that describe the output of a layer other than the model's.

    These are the statistics behind lambda layers that are not loaded, as when a plain ResNet starts a lambda ResNet.
    """
    stale = []
    for name, module in model.named_modules():
        if isinstance(module, LambdaLayer) and f"{name}.position_weight" not in fits:
            behind = f"{name.rpartition('.')[0]}.bn2"
            stale += [f"{behind}.{s}" for s in ("running_mean", "running_var", "num_batches_tracked")]
    return stale


def _unused_entry(source: tuple[str, Tensor], shape: tuple[int, ...] | None) -> str:
    name, tensor = source
    if shape == tuple(tensor.shape):
        return f"{name} (of another layer's output)"
    return name if shape is None else f"{name} {tuple(tensor.shape)} (fresh: {shape})"
