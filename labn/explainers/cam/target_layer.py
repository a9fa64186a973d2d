"""The search for the target layer: the last call of a layer that returns spatial feature maps, or tokens of a grid.

A module may run several times in one forward pass, as a shared activation does. So a target is one call of a layer and
not the layer alone.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.fingerprint import ModelCache, structure_key
from labn.inference.hooks import temporary_hooks
from labn.inference.layout import Layout, LayoutRecorder, is_strided
from labn.inference.modes import explaining, run_model
from labn.inference.token_grid import TokenGrid

POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

NORMS = (nn.LayerNorm, nn.RMSNorm)

COMPILED = "_orig_mod."  # the prefix that `torch.compile` puts before the names of a module's own layers

# The weights do not decide which layer is the last one.
_Found = tuple[str, int, int, bool | None, TokenGrid | None]
_targets: ModelCache[_Found] = ModelCache(structure_key)


@dataclass(frozen=True)
class TargetLayer:
    """One call of a layer in the forward pass of a model.

    Attributes:
        module: the layer.
        call: number of the call, from 0.
        calls: number of calls of the layer in one forward pass.
        channels_last: whether it returns (B, h, w, K) and not (B, K, h, w); None where its operations do not tell.
        grid: the positions among the tokens (B, N, K) that it returns; None for a layer that returns feature maps.
    """

    module: nn.Module
    call: int = 0
    calls: int = 1
    channels_last: bool | None = None
    grid: TokenGrid | None = None

    def has_channels_last(self, shape: torch.Size, size: torch.Size) -> bool:
        """`channels_last`, or, where that is None, what the sizes of maps of this shape suggest for an image (H, W)."""
        return is_channels_last(shape, size) if self.channels_last is None else self.channels_last

    def maps_of(self, output: Any, size: torch.Size) -> Tensor:
        """The feature maps (B, K, h, w) of what the layer returned for images of the size (H, W).

        Raises:
            InputError: these are no feature maps, and no tokens whose grid is known.
        """
        if self.grid is not None and isinstance(output, Tensor) and output.ndim == 3:
            return self.grid.maps(output)
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"target_layer ({type(self.module).__name__}) returns {shape}; (B, K, h, w) is needed.")
        return output.permute(0, 3, 1, 2) if self.has_channels_last(output.shape, size) else output

    def output_of(self, maps: Tensor, output: Tensor, size: torch.Size) -> Tensor:
        """What the layer would return with maps (n, K, h, w) in place of those of its output (1 or n, ...)."""
        if self.grid is not None and output.ndim == 3:
            return self.grid.tokens(maps, output)
        return maps.permute(0, 2, 3, 1) if self.has_channels_last(output.shape, size) else maps


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
    """One output of the traced forward; the version distinguishes a tensor from itself after an in-place layer.

    Attributes:
        name: name of the layer.
        call: number of the call of this layer, from 0.
        output: what it returned.
        version: version counter of the output at that time.
        is_map: whether the output is feature maps.
        channels_last: whether they are (B, h, w, K); None where the operations do not tell.
        from_tokens: whether the layer read tokens.
        grid: the positions among the tokens that it returned, where the operations tell.
        differentiable: whether gradients were recorded when the layer ran.
    """

    name: str
    call: int
    output: Tensor
    version: int
    is_map: bool
    channels_last: bool | None
    from_tokens: bool
    grid: TokenGrid | None = None
    differentiable: bool = True

    @property
    def is_tokens(self) -> bool:
        """Whether the output is (B, N, K), as in a transformer."""
        return _is_tokens(self.output)

    def same(self, other: _Seen) -> bool:
        """Whether both are the same tensor without an in-place change in between."""
        return self.output is other.output and self.version == other.version


def _is_map(output: Tensor, size: torch.Size, layout: Layout | None) -> bool:
    """Whether an output is feature maps of more than one position.

    Operations that keep rows and columns from the image on make maps of any proportions. Other outputs must have about
    those of the image. They may differ by a quarter, because convolutions without padding reduce a side more than a
    stride does. A transformer's (B, heads, N, d) is far from both.
    """
    if output.ndim != 4 or 0 in output.shape or (layout is not None and layout.channel_axis not in (1, 3)):
        return False
    last = is_channels_last(output.shape, size) if layout is None else layout.channel_axis == 3
    rows, columns = output.shape[1:3] if last else output.shape[2:]
    if layout is not None and layout.spatial and min(rows, columns) > 1:
        return True
    expected = rows * size[1] / size[0]
    near = abs(columns - expected) <= max(1, expected / 4)
    return rows * columns > 1 and (near or is_strided(rows, columns, size))


@dataclass
class _Trace:
    """One forward pass of a model on the first image.

    Attributes:
        seen: the differentiable outputs of all layers, in order of completion.
        hidden: the feature maps that were made without gradients, as under `torch.no_grad`.
        calls: name of a layer -> number of its calls.
        logits: (1, num_classes).
    """

    seen: list[_Seen]
    hidden: list[_Seen]
    calls: Counter[str]
    logits: Tensor


def _trace(model: nn.Module, images: Tensor) -> _Trace:
    """Trace the outputs of all layers in one forward pass on the first image."""
    seen: list[_Seen] = []
    hidden: list[_Seen] = []
    calls: Counter[str] = Counter()

    image = images[:1].detach().clone().requires_grad_()
    layouts = LayoutRecorder(image)

    def see(name: str, args: Any, output: Any) -> None:
        if not name:
            return
        call, differentiable = calls[name], torch.is_grad_enabled()
        calls[name] += 1
        if isinstance(output, Tensor) and (output.requires_grad or not differentiable):
            layout = layouts.of(output)
            is_map = _is_map(output, images.shape[-2:], layout)
            last = None if layout is None else layout.channel_axis == 3
            tokens = _is_tokens(args[0] if args else None)
            grid = None if layout is None or layout.channel_axis != 2 else layout.grid
            entry = _Seen(name, call, output, output._version, is_map, last, tokens, grid, differentiable)
            (seen if output.requires_grad else hidden).append(entry)

    # The image requires a gradient, so that outputs that depend on it can be told from constants.
    with watching(dict(model.named_modules()), see), layouts:
        logits = run_model(model, image)
    return _Trace(seen, [entry for entry in hidden if entry.is_map], calls, logits)


def _on_path(logits: Tensor, output: Tensor) -> bool:
    """Whether the logits depend on `output`."""
    if not logits.requires_grad:
        return False
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


def _bypassed(model: nn.Module, images: Tensor, layer: nn.Module, call: int, others: set[int]) -> bool:
    """Whether the logits depend on other calls of the layer by a way that does not lead through `call`.

    The output of this call is replaced by a copy without history; a gradient that still reaches another call took
    another way.
    """
    count, outputs = 0, list[Tensor]()

    def see(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count - 1 == call:
            return output.detach().clone()
        if count - 1 in others:
            outputs.append(output)
        return None

    with temporary_hooks(after={layer: see}):
        logits = run_model(model, images[:1].detach().clone().requires_grad_())
    return any(output.requires_grad and _on_path(logits, output) for output in outputs)


def _chosen_call(model: nn.Module, images: Tensor, name: str, trace: _Trace) -> _Found:
    """Name, number and count of the last call of a layer with feature maps that determine the logits; their layout.

    Raises:
        InputError: the logits depend on several calls side by side, so that one call does not explain them.
    """
    layer = named_layer(model, name)
    names = {n for n, module in model.named_modules() if module is layer}
    usable = [s for s in trace.seen if s.name in names and (s.is_map or s.grid is not None)]
    maps = [s for s in usable if _on_path(trace.logits, s.output)]
    # Without feature maps the layer's first call is left to the method, which names what it returns.
    call, calls = (maps[-1].call if maps else 0), max((trace.calls[n] for n in names), default=1)
    if len(maps) > 1 and _bypassed(model, images, layer, call, {s.call for s in maps[:-1]}):
        raise InputError(
            f"target_layer {name.removeprefix(COMPILED)!r} runs {calls} times in one forward pass of "
            f"{type(model).__name__}, and the logits depend on {len(maps)} of its feature maps side by side, as with "
            "test-time augmentation or siamese branches; explain the part that runs once, or name a layer that does."
        )
    last, grid = next(
        ((s.channels_last, s.grid) for s in trace.seen if s.name in names and s.call == call), (None, None)
    )
    return name.removeprefix(COMPILED), call, max(calls, 1), last, grid


def _search(model: nn.Module, images: Tensor) -> _Found:
    with explaining(model, images.device.type):
        trace = _trace(model, images)
        return _chosen_call(model, images, _target_name(model, trace), trace)


def _target_name(model: nn.Module, trace: _Trace) -> str:
    """Name of the last layer with feature maps, or, where a network mostly processes tokens, with tokens of a grid."""
    position = _last_map(model, trace.seen, trace.logits)
    if position is not None and not _mostly_tokens(model, trace.seen, position):
        return _outermost(trace.seen, position).removeprefix(COMPILED)
    tokens = _last_tokens(model, trace)
    if tokens is not None:
        return tokens.name
    if position is None:
        raise InputError(_no_maps(model, trace))
    name = _outermost(trace.seen, position).removeprefix(COMPILED)
    raise InputError(
        f"{type(model).__name__} works on tokens after {name!r}, its last layer with feature maps, and their places in "
        "the image are not known from its operations; take the method rollout, or name a layer with target_layer."
    )


def _last_tokens(model: nn.Module, trace: _Trace) -> _Seen | None:
    """The last layer whose tokens have known places in the image that determine the logits; norms go first.

    Behind the last attention of a network with a class token, only that token does.
    """
    layers = dict(model.named_modules())
    gridded = [s for s in reversed(trace.seen) if s.grid is not None]
    norms = [s for s in gridded if isinstance(layers[s.name], NORMS) or type(layers[s.name]).__name__.endswith("Norm")]
    return next((s for s in (*norms, *gridded) if _places_matter(trace.logits, s)), None)


def _places_matter(logits: Tensor, entry: _Seen) -> bool:
    """Whether the logits depend on tokens of the grid."""
    assert entry.grid is not None
    if not logits.requires_grad:
        return False
    # Another factor for every class: norms make the gradient of the plain sum vanish.
    factors = torch.linspace(1, 2, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    score = (logits * factors).sum()
    (gradient,) = torch.autograd.grad(score, entry.output, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(entry.grid.maps(gradient).any())


def _no_maps(model: nn.Module, trace: _Trace) -> str:
    """The sentence that says why no layer can be a target."""
    if trace.hidden:
        return (
            f"{type(model).__name__} runs {trace.hidden[-1].name!r}, its last layer with spatial feature maps, under "
            "torch.no_grad(), so that no gradient reaches the layers before the head; remove that, or take a method "
            "without gradients, such as rise or occlusion."
        )
    if not trace.logits.requires_grad and any(s.is_map for s in trace.seen):
        return (
            f"{type(model).__name__} has feature maps, but no gradient of its logits reaches them: a layer behind them "
            "passes none (quantised, under torch.no_grad(), through NumPy); take rise or occlusion."
        )
    way_out = "take the method rollout, or name one" if any(s.is_tokens for s in trace.seen) else "name one"
    return f"{type(model).__name__} has no layer with spatial feature maps; {way_out} with target_layer."


def search_target_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the last layer whose feature maps have more than one position and determine the logits.

    Pooling layers are skipped, so that the layer of a VGG is its last convolution after the ReLU. Of nested modules
    that return the same tensor, the outermost is taken. In a network that mostly processes tokens, such as a vision
    transformer or a Mixer, it is the last norm whose tokens, put back into the grid of patches, determine the logits.

    Args:
        model: run once on the first image, in eval mode.
        images: (B, C, H, W).

    Raises:
        InputError: no layer has such feature maps or tokens of a known grid, or the last one runs several times side
            by side.
    """
    return _search(model, images)[0]


def find_target_layer(model: nn.Module, images: Tensor) -> str:
    """`search_target_layer`, cached per image size until the model's layers change."""
    return _targets.get(model, tuple(images.shape[1:]), lambda: _search(model, images))[0]


def target_layer_of(model: nn.Module, images: Tensor, name: str | nn.Module | None) -> TargetLayer:
    """The call of a layer that an explanation weighs; found once per image size until the model's layers change.

    Args:
        model: run once on the first image, in eval mode.
        images: (B, C, H, W).
        name: name of the layer, or the layer itself; None: the last one with spatial feature maps.

    Raises:
        InputError: see `search_target_layer`; or there is no such layer.
    """
    if isinstance(name, nn.Module):
        name = name_of(model, name)
    size = tuple(images.shape[1:])
    if name is None:
        found = _targets.get(model, size, lambda: _search(model, images))
    else:
        found = _targets.get(model, (size, name), lambda: _named(model, images, name))
    return TargetLayer(named_layer(model, found[0]), *found[1:])


def _named(model: nn.Module, images: Tensor, name: str) -> _Found:
    named_layer(model, name)
    with explaining(model, images.device.type):
        return _chosen_call(model, images, name, _trace(model, images))


def name_of(model: nn.Module, layer: nn.Module) -> str:
    """Name of a submodule.

    Raises:
        InputError: the layer is not a submodule of the model.
    """
    for name, module in model.named_modules():
        if module is layer and name:
            return name.removeprefix(COMPILED)
    raise InputError(f"target_layer is a {type(layer).__name__} that is not a layer of {type(model).__name__}.")
