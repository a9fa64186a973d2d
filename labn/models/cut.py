"""A network of any kind cut behind one of its modules, where an attention branch gates the features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.deep_copy import deep_copy
from labn.inference.hooks import temporary_hooks
from labn.inference.layout import Layout, LayoutRecorder, is_strided
from labn.inference.modes import evaluating, explaining, logits_of
from labn.models.backbones import input_channels

Gate = Callable[[Tensor], Tensor]
LISTS = (nn.Sequential, nn.ModuleList)
PROBE_SIDES = (64, 224, 256)
"""Sides in pixels of the images that are tried where a network does not state its input's."""


@dataclass(frozen=True)
class FeatureLayout:
    """How a module's output holds feature maps (B, K, h, w): as they are, with the channels last, or as tokens.

    Attributes:
        layout: the dimension of the channels and, for tokens, the grid for images of `side` pixels.
        channels: K.
        side: rows and columns of the image for which the layout was found.

    Example:
        >>> layout = FeatureLayout(Layout(3, True), channels=5, side=(8, 8))
        >>> layout.maps(torch.zeros(2, 4, 4, 5), (8, 8)).shape
        torch.Size([2, 5, 4, 4])
    """

    layout: Layout
    channels: int
    side: tuple[int, int]

    def maps(self, features: Tensor, side: tuple[int, int]) -> Tensor:
        """Feature maps (B, K, h, w) of a module's output, for images of `side` pixels; a class token is left out."""
        axis, scaled = self.layout.channel_axis, self._for(side)
        return features.movedim(axis, 1) if scaled.grid is None else scaled.grid.maps(features.movedim(axis, 2))

    def features(self, maps: Tensor, like: Tensor, side: tuple[int, int]) -> Tensor:
        """Maps (B, k, h, w) in the layout of the module's output `like`; further tokens are 0."""
        axis, scaled = self.layout.channel_axis, self._for(side)
        if scaled.grid is None:
            return maps.movedim(1, axis)
        others = maps.new_zeros(1, like.shape[3 - axis], maps.shape[1])
        return scaled.grid.tokens(maps, others).movedim(2, axis)

    def _for(self, side: tuple[int, int]) -> Layout:
        """The layout for images of another size; the patches of the grid keep their size in pixels."""
        grid = self.layout.grid
        if grid is None or side == self.side:
            return self.layout
        rows, columns = grid.rows * side[0] // self.side[0], grid.columns * side[1] // self.side[1]
        return replace(self.layout, grid=replace(grid, rows=rows, columns=columns))


@dataclass(frozen=True)
class Cut:
    """A place behind a module, through which all that the prediction knows of the image passes.

    Attributes:
        name: the module.
        features: layout of its output.
        before: names of the parameters that act only before the cut.
        modules_before: names of the modules that have run when the features are there, and do not run again.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)
        >>> cut = find_cut(network, "1")
        >>> cut.features.channels, cut.before
        (4, ('0.weight', '0.bias'))
    """

    name: str
    features: FeatureLayout
    before: tuple[str, ...]
    modules_before: tuple[str, ...]

    def run(self, network: nn.Module, images: Tensor, gate: Gate) -> Tensor:
        """Logits (B, num_classes) of a network whose features at the cut are replaced by `gate(features)`.

        Raises:
            InputError: the module ran several times, or not at all.
        """
        calls = 0

        def replace_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return gate(output)

        with temporary_hooks(after={network.get_submodule(self.name): replace_output}):
            logits = logits_of(network(images))
        _check_single(self.name, calls)
        return logits


def find_cut(network: nn.Module, split: int | str) -> Cut:
    """Find out how a network can be cut, by running it on an image of noise.

    Args:
        network: maps images (B, C, H, W) to logits.
        split: name of the module behind which it is cut (`stages.2.blocks.4`), or a number of blocks (`block_names`).

    Raises:
        InputError: the module does not exist, runs several times, or gives no feature maps; information about the
            image passes beside it; or the prediction does not depend on it.
    """
    name = _name_of(network, split)
    images, network = _probe(network), _with_noise(network)
    with explaining(network, images.device.type):
        layout, finished = _observe(network, name, images)
        cut = Cut(name, layout, (), finished)
        _check_no_way_round(network, cut, images)
        return replace(cut, before=_parameters_before(network, cut, images))


@torch.no_grad()
def _with_noise(network: nn.Module) -> nn.Module:
    """A copy in which no parameter is constant: scales and heads that start at 0 hide what depends on what."""
    copied, generator = deep_copy(network), torch.Generator().manual_seed(1)
    for parameter in copied.parameters():
        parameter.requires_grad_()
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return copied


def block_names(network: nn.Module) -> list[str]:
    """Names of the blocks of a timm network in order, from what timm says of its feature stages.

    Stages that are members of one list, such as `blocks` of an EfficientNet, are those of the whole list. A stage is
    divided into its members where it is a sequence, has a sequence named `blocks`, or consists of modules of one class;
    otherwise it is a block itself.

    Raises:
        InputError: the network has no `feature_info`.
    """
    info = getattr(network, "feature_info", None)
    if not info:
        raise InputError(f"timm does not tell the feature stages of {type(network).__name__}.")
    modules, stages = dict(network.named_modules()), dict[str, None]()
    # Some networks name places that are none of their modules, such as HRNet's stem.
    for name in (entry["module"] for entry in info if entry["module"] in modules):
        parent = name.rpartition(".")[0]
        members = _members(modules[parent]) if parent and isinstance(modules[parent], LISTS) else {}
        stages |= dict.fromkeys((f"{parent}.{member}" for member in members) if members else (name,))
    return [block for stage in stages for block in _blocks_of(stage, modules[stage])]


def last_stage_depth(network: nn.Module) -> int:
    """Number of blocks in the last stage of a timm network."""
    stages = [name.rpartition(".")[0] for name in block_names(network)]
    return stages.count(stages[-1])


def own_blocks(network: nn.Module, cut: Cut, count: int) -> nn.Sequential:
    """New blocks (B, K, h, w) -> (B, K, h, w) of the kind that the network has at the cut.

    They are copies, with new random weights, of the nearest block that keeps the shape of its features.

    Raises:
        InputError: no block keeps the shape at the cut, or its forward needs more than features.
    """
    images = _probe(network)
    names = [name for name, module in network.named_modules() if name and (_is_block(module) or name == cut.name)]
    seen: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: (args, output)})

    modules = dict(network.named_modules())
    with torch.no_grad(), evaluating(network, images.device.type):
        with temporary_hooks(after={modules[name]: note(name) for name in names}):
            network(images)
        output = seen[cut.name][1] if cut.name in seen else None
    order = list(seen)
    fitting = [
        name
        for name, (args, result) in seen.items()
        if len(args) == 1 and all(isinstance(t, Tensor) and _same_shape(t, output) for t in (args[0], result))
    ]
    if output is None or not fitting:
        raise InputError(
            f"No block of {type(network).__name__} keeps the shape of the features behind {cut.name}; take lab_block "
            "plain or lambda."
        )
    place = order.index(cut.name)
    # Of blocks that are equally near, the outer one, which runs longer: a whole block and not one of its parts.
    nearest = min(fitting, key=lambda name: (abs(order.index(name) - place), name.count(".")))
    blocks = nn.Sequential(*(MapBlock(_fresh(modules[nearest]), cut.features) for _ in range(count)))
    try:
        with torch.no_grad(), evaluating(blocks, images.device.type):
            blocks(cut.features.maps(output, (images.shape[2], images.shape[3])))
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{nearest} of {type(network).__name__} does not run alone ({error}); take lab_block plain or lambda."
        ) from error
    return blocks


class MapBlock(nn.Module):
    """A block of a network as a module from feature maps (B, K, h, w) to feature maps of the same shape.

    Args:
        block: from features to features of the same shape.
        features: layout of the features.
    """

    def __init__(self, block: nn.Module, features: FeatureLayout) -> None:
        super().__init__()
        self.block = block
        self._features = features

    def forward(self, maps: Tensor) -> Tensor:
        """Run the block on maps (B, K, h, w), without the tokens outside of the grid."""
        axis, tokens = self._features.layout.channel_axis, self._features.layout.grid is not None
        features = maps.flatten(2).movedim(1, axis) if tokens else maps.movedim(1, axis)
        output = self.block(features).movedim(axis, 1)
        return output.reshape(maps.shape) if tokens else output


def _is_block(module: nn.Module) -> bool:
    """Whether a module has two layers with weights; a norm with its activation is no block."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1


def _fresh(block: nn.Module) -> nn.Module:
    """A copy of a block with new random weights, as far as its layers know how to reset theirs."""
    copied = deep_copy(block)
    for module in copied.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return copied


def _same_shape(tensor: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and tensor.shape == other.shape


def _name_of(network: nn.Module, split: int | str) -> str:
    """Name of the module behind which a network is cut."""
    if isinstance(split, str):
        if split not in dict(network.named_modules()) or not split:
            raise InputError(f"split is {split!r}, which is no module of {type(network).__name__}.")
        return split
    names = block_names(network)
    if not 1 <= split <= len(names):
        raise InputError(
            f"split is {split}; this backbone has {len(names)} blocks, so that it must be 1 to {len(names)}, or a "
            f"name such as {names[len(names) // 2]}."
        )
    return names[split - 1]


def _members(module: nn.Module) -> dict[str, nn.Module]:
    """The children of a module that have children themselves, by name; a norm or an activation is no block."""
    return {name: child for name, child in module.named_children() if list(child.children())}


def _blocks_of(name: str, stage: nn.Module) -> list[str]:
    inner = getattr(stage, "blocks", None)
    if isinstance(inner, LISTS):
        return [f"{name}.blocks.{member}" for member in _members(inner)] or [name]
    members = _members(stage)
    alike = len(members) == len(list(stage.children())) and len({type(m) for m in members.values()}) == 1
    is_list = isinstance(stage, LISTS)
    divided = bool(members) and (is_list or (alike and len(members) > 1))
    return [f"{name}.{member}" for member in members] if divided else [name]


def _probe(network: nn.Module) -> Tensor:
    """Two images of noise (2, C, H, W) of the first size that the network accepts."""
    stated = (getattr(network, "pretrained_cfg", None) or {}).get("input_size")
    patches = getattr(getattr(network, "patch_embed", None), "img_size", None)
    sizes = [tuple(patches)] if isinstance(patches, (tuple, list)) else []
    sizes += [tuple(stated[1:])] if stated else []
    parameter, channels = next(network.parameters()), input_channels(network)
    for size in (*sizes, *((side, side) for side in PROBE_SIDES)):
        images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            with torch.no_grad(), evaluating(network, images.device.type):
                logits_of(network(images))
        except (RuntimeError, ValueError, AssertionError):
            continue
        return images
    raise InputError(f"{type(network).__name__} accepts images of none of the sizes {list(PROBE_SIDES)}.")


def _observe(network: nn.Module, name: str, images: Tensor) -> tuple[FeatureLayout, tuple[str, ...]]:
    """Layout of the features at the cut, and the names of the modules that have run by then and do not run again."""
    finished: dict[str, None] = {}
    again: set[str] = set()
    found: list[tuple[tuple[str, ...], Layout | None, Tensor]] = []

    def note(called: str) -> Callable[..., None]:
        def finish(module: nn.Module, args: Any, output: Any) -> None:
            if not found:
                finished[called] = None
            else:
                again.add(called)
            if called == name:
                found.append((tuple(finished), layouts.of(output) if isinstance(output, Tensor) else None, output))

        return finish

    hooks = {module: note(called) for called, module in network.named_modules() if called}
    with torch.no_grad(), LayoutRecorder(images) as layouts, temporary_hooks(after=hooks):
        network(images)
    _check_single(name, len(found))
    names, layout, output = found[0]
    if layout is None or not _is_known(layout, output, images):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"split is {name!r}, whose output {shape} is not known to be feature maps or tokens of a grid; name "
            "another module, such as the end of a stage."
        )
    side = (images.shape[2], images.shape[3])
    before = tuple(each for each in names if each not in again)
    return FeatureLayout(layout, output.shape[layout.channel_axis], side), before


def _is_known(layout: Layout, output: Tensor, images: Tensor) -> bool:
    """Whether an output's rows and columns are those of the image."""
    if output.ndim != 4:
        return layout.spatial and layout.grid is not None
    rows, columns = (side for axis, side in enumerate(output.shape) if axis not in (0, layout.channel_axis))
    # Patch merging, as in Swin, keeps the proportions by operations that do not tell so.
    return layout.spatial or is_strided(rows, columns, images.shape[2:])


def _check_single(name: str, calls: int) -> None:
    if calls != 1:
        raise InputError(f"split is {name!r}, which runs {calls} times in one forward pass; it must run once.")


def _check_no_way_round(network: nn.Module, cut: Cut, images: Tensor) -> None:
    """Compare the logits of two images whose features at the cut are equal."""
    with torch.no_grad():
        free = logits_of(network(images.clone()))
        same = cut.run(network, images.clone(), lambda features: features[:1].expand_as(features).clone())
    scale = free.abs().max().clamp(min=1e-6)
    if float((same[0] - same[1]).abs().max() / scale) > 1e-4:
        raise InputError(
            f"split is {cut.name!r}, but information about the image also passes beside this module, so that a gate "
            "behind it would not close; name a module that everything passes through, such as the end of a stage."
        )


def _parameters_before(network: nn.Module, cut: Cut, images: Tensor) -> tuple[str, ...]:
    """Names of the parameters that the prediction does not depend on, given the features at the cut."""
    leaves: list[Tensor] = []

    def gate(features: Tensor) -> Tensor:
        # Only the positions of the grid are gated: a class token is 0 behind the gate.
        maps = cut.features.maps(features.detach(), (images.shape[2], images.shape[3]))
        leaves.append(maps.requires_grad_())
        return cut.features.features(maps, features.detach(), (images.shape[2], images.shape[3]))

    named = list(network.named_parameters())
    logits = cut.run(network, images.clone(), gate)
    wanted = [*leaves, *(parameter for _, parameter in named)]
    of_maps, *gradients = torch.autograd.grad(logits.square().sum(), wanted, allow_unused=True)
    if of_maps is None or not bool(of_maps.ne(0).any()):
        raise InputError(
            f"split is {cut.name!r}, but the prediction does not depend on the feature maps there; name an earlier "
            "module: after the last block, a transformer with a class token reads nothing but this token."
        )
    return tuple(name for (name, _), gradient in zip(named, gradients) if gradient is None)
