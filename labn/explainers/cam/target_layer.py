"""The search for the target layer: the last layer with spatial feature maps."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.fingerprint import ModelCache, structure_key
from labn.inference.hooks import temporary_hooks
from labn.inference.modes import explaining, logits_of

POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

COMPILED = "_orig_mod."  # the prefix that `torch.compile` puts before the names of a module's own layers

_names: ModelCache[str] = ModelCache(structure_key)  # the weights do not decide which layer is the last one


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call `see(name, args, output)` after every forward of `modules` within the block, in the order of completion."""
    with temporary_hooks(after={m: lambda _m, a, out, name=name: see(name, a, out) for name, m in modules.items()}):
        yield


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`; the layers of a compiled model keep the names of the original.

    Raises:
        InputError: there is no such layer; the message lists the nearest names.
    """
    layers = dict(model.named_modules())
    for candidate in (name, COMPILED + name):
        if name and candidate in layers:
            return layers[candidate]
    near = difflib.get_close_matches(name, [n.removeprefix(COMPILED) for n in layers if n], n=5, cutoff=0.0)
    raise InputError(f"target_layer {name!r} is not a layer of {type(model).__name__}; near it: {', '.join(near)}.")


def is_strided(rows: int, columns: int, size: torch.Size) -> bool:
    """Whether one stride s reduces the images' H and W to `rows` and `columns`, up to less than one position each.

    The test is H / s in (rows - 1, rows + 1) and W / s in (columns - 1, columns + 1). It allows for the rounding of
    padded convolutions and poolings, which takes small maps of elongated images far from the images' proportions.
    """
    height, width = size
    return (rows - 1) * width < (columns + 1) * height and (columns - 1) * height < (rows + 1) * width


def is_channels_last(shape: torch.Size, size: torch.Size) -> bool:
    """Whether feature maps of this shape are (B, h, w, K) and not (B, K, h, w), judged by the images' proportions.

    Swin and its relatives keep the channels in the last dimension. A shape that a stride explains as (B, K, h, w) is
    read as such first, because by chance K / h may be nearer to H / W than the rounded h / w is.
    """
    if is_strided(shape[2], shape[3], size):
        return False
    # Logarithms compare ratios: twice as wide and half as wide are equally far from square.
    proportion = math.log(size[0] / size[1])
    first, last = abs(math.log(shape[2] / shape[3]) - proportion), abs(math.log(shape[1] / shape[2]) - proportion)
    return last < first


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] > 1


@dataclass(frozen=True)
class _Seen:
    """One output of the traced forward; the version distinguishes a tensor from itself after an in-place layer."""

    name: str
    output: Tensor
    version: int
    is_map: bool
    from_tokens: bool

    @property
    def is_tokens(self) -> bool:
        """Whether the output is (B, N, K), as in a transformer."""
        return _is_tokens(self.output)

    def same(self, other: _Seen) -> bool:
        """Whether both are the same tensor without an in-place change in between."""
        return self.output is other.output and self.version == other.version


def _is_map(output: Tensor, size: torch.Size) -> bool:
    """Whether an output is feature maps of more than one position, in about the images' proportions.

    The proportions may differ by a quarter, because convolutions without padding reduce a side more than a stride does.
    A transformer's (B, heads, N, d) is far from both.
    """
    if output.ndim != 4 or 0 in output.shape:
        return False
    rows, columns = output.shape[1:3] if is_channels_last(output.shape, size) else output.shape[2:]
    expected = rows * size[1] / size[0]
    near = abs(columns - expected) <= max(1, expected / 4)
    return rows * columns > 1 and (near or is_strided(rows, columns, size))


def _trace(model: nn.Module, images: Tensor) -> tuple[list[_Seen], Tensor]:
    """Every differentiable output of one forward, in order of completion, and the logits."""
    seen: list[_Seen] = []

    def see(name: str, args: Any, output: Any) -> None:
        if name and isinstance(output, Tensor) and output.requires_grad:
            is_map = _is_map(output, images.shape[-2:])
            seen.append(_Seen(name, output, output._version, is_map, _is_tokens(args[0] if args else None)))

    # The image requires a gradient, so that outputs that depend on it can be told from constants.
    with watching(dict(model.named_modules()), see):
        logits = logits_of(model(images[:1].detach().clone().requires_grad_()))
    return seen, logits


def _on_path(logits: Tensor, output: Tensor) -> bool:
    """Whether the logits depend on `output`."""
    (gradient,) = torch.autograd.grad(logits.sum(), output, retain_graph=True, allow_unused=True)
    return gradient is not None


def _inside_tokens(name: str, tokens: set[str]) -> bool:
    """Whether a layer around this one maps tokens to tokens, so that a 4-D output inside it is (B, heads, N, d)."""
    return any(name.startswith(f"{around}.") for around in tokens)


def _mostly_tokens(model: nn.Module, seen: list[_Seen], position: int) -> bool:
    """Whether more layers with weights process tokens after `seen[position]` than run before it."""
    # Leaf modules with parameters count, whatever blocks they are grouped in.
    leaves = {name for name, m in model.named_modules() if not m._modules and m._parameters}
    before = sum(s.name in leaves for s in seen[: position + 1])
    after = sum(s.name in leaves and s.is_tokens for s in seen[position + 1 :])
    return after > before


def _last_map(model: nn.Module, seen: list[_Seen], logits: Tensor) -> int | None:
    """Position of the last feature maps that are not pooled, lie outside of token layers, and determine the logits."""
    layers = dict(model.named_modules())
    pooled = [s for s in seen if isinstance(layers[s.name], POOLING)]
    tokens = {s.name for s in seen if s.is_tokens and s.from_tokens}
    for position in reversed(range(len(seen))):
        entry = seen[position]
        usable = entry.is_map and not _inside_tokens(entry.name, tokens) and not any(entry.same(p) for p in pooled)
        if usable and _on_path(logits, entry.output):
            return position
    return None


def _outermost(seen: list[_Seen], position: int) -> str:
    """Name of the outermost module around the first one that returns the tensor of `seen[position]`."""
    same = [s.name for s in seen if s.same(seen[position])]
    return min((name for name in same if f"{same[0]}.".startswith(f"{name}.")), key=len)


def search_target_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the last layer whose feature maps have more than one position and determine the logits.

    Pooling layers are skipped, so that the layer of a VGG is its last convolution after the ReLU. Of nested modules
    that return the same tensor, the outermost is taken.

    Args:
        model: run once on the first image, in eval mode.
        images: (B, C, H, W).

    Raises:
        InputError: no layer has such feature maps, or most of the network processes tokens after the last one.
    """
    with explaining(model, images.device.type):
        seen, logits = _trace(model, images)
        position = _last_map(model, seen, logits)
    if position is None:
        way_out = "take the method rollout, or name one" if any(s.is_tokens for s in seen) else "name one"
        raise InputError(f"{type(model).__name__} has no layer with spatial feature maps; {way_out} with target_layer.")
    name = _outermost(seen, position).removeprefix(COMPILED)
    if _mostly_tokens(model, seen, position):
        raise InputError(
            f"{type(model).__name__} works on tokens after {name!r}, its last layer with feature maps; "
            "take the method rollout, or name a layer with target_layer."
        )
    return name


def find_target_layer(model: nn.Module, images: Tensor) -> str:
    """`search_target_layer`, cached per image size until the model's layers change."""
    return _names.get(model, tuple(images.shape[1:]), lambda: search_target_layer(model, images))
