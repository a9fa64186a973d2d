"""The layout of feature maps and tokens in a forward pass, known from the operations that made them.

Sizes do not tell (B, K, h, w) from (B, h, w, K): with K = h both look alike. Convolutions, 2-D poolings and norms over
channels define dimension 1 as the channels; permutations move it; reshapes keep the order of memory, so that a
dimension with the same size and the same number of values before it is the same one; elementwise operations keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from labn.inference.token_grid import TokenGrid

# Beside every function whose name ends in `2d`, such as conv2d and adaptive_avg_pool2d.
CHANNELS_FIRST = {
    "batch_norm", "group_norm", "instance_norm", "local_response_norm", "interpolate", "upsample", "grid_sample",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
}  # fmt: skip

MOVES = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "mT"}

RESHAPES = {"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze"}

# They return as many dimensions in the same order, of other sizes.
RESIZES = {"linear", "cat", "concat", "concatenate", "pad", "narrow", "chunk", "split", "split_with_sizes"}

# Outputs of the input's shape may hold its values in another order or mix them.
REARRANGES = {"matmul", "bmm", "baddbmm", "einsum", "rot90", "T", "H", "mH", "as_strided", "gather", "tensordot"}


# They keep the shape and may move tokens to other places.
REORDERS = {"index_select", "flip", "roll", "sort", "take_along_dim", "fliplr", "flipud"}


@dataclass(frozen=True)
class Layout:
    """The layout of a tensor (B, ...).

    Attributes:
        channel_axis: the dimension of the channels.
        spatial: whether the other dimensions are the rows and columns of the image, by way of operations that keep
            them.
        grid: the rows and columns that the third dimension of tokens or flattened maps joins; None elsewhere.
    """

    channel_axis: int
    spatial: bool
    grid: TokenGrid | None = None


class LayoutRecorder(TorchFunctionMode):
    """Knows, within its block, the layouts of the tensors that are computed from an image.

    Args:
        image: (1, C, H, W).

    Example:
        >>> image = torch.zeros(1, 3, 4, 4)
        >>> with LayoutRecorder(image) as layouts:
        ...     moved = image.permute(0, 2, 3, 1).relu()
        >>> layouts.of(moved)
        Layout(channel_axis=3, spatial=True, grid=None)
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self._layouts = WeakTensorKeyDictionary()
        self._layouts[image] = Layout(1, True)

    def of(self, tensor: Tensor) -> Layout | None:
        """The layout of a tensor; None where the operations do not tell."""
        layout: Layout | None = self._layouts.get(tensor)
        return layout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.ndim > 2:
                layout = self._layout(_name_of(func), func, args, kwargs or {}, value)
                if layout is not None:
                    self._layouts[value] = _checked(layout, value)
        return result

    def _layout(self, name: str, func: Any, args: Any, kwargs: Any, value: Tensor) -> Layout | None:
        tensors = [a for a in _flat((args, tuple(kwargs.values()))) if isinstance(a, Tensor)]
        known = [(tensor, layout) for tensor in tensors if (layout := self.of(tensor)) is not None]
        if name.endswith("2d") or name in CHANNELS_FIRST:
            return Layout(1, any(tensor is tensors[0] and layout == Layout(1, True) for tensor, layout in known))
        if not known and (name == "linear" or (name == "layer_norm" and len(args[1]) == 1)):
            # Both work on the features of every position.
            return Layout(value.ndim - 1, False)
        if not known or name in REARRANGES:
            return None
        if name in MOVES:
            return _moved(func, args, kwargs, *known[0])
        if name in RESHAPES:
            return _reshaped(*known[0], value)
        if name in RESIZES or (name == "getitem" and _is_slicing(args[1])):
            known = [(tensor, layout) for tensor, layout in known if tensor.ndim == value.ndim]
            known = [(tensor, _shifted(name, args, kwargs, tensor, layout, value)) for tensor, layout in known]
        else:
            known = [(tensor, layout) for tensor, layout in known if tensor.shape == value.shape]
            if name == "getitem":  # by indices, in any order
                known = [(tensor, replace(layout, grid=None)) for tensor, layout in known]
        axes = {layout.channel_axis for _, layout in known}
        grids = [] if name in REORDERS else [layout.grid for _, layout in known if layout.grid is not None]
        spatial = any(layout.spatial for _, layout in known)
        return Layout(axes.pop(), spatial, grids[0] if grids else None) if len(axes) == 1 else None


def _name_of(func: Any) -> str:
    name = str(getattr(func, "__name__", func))
    named = getattr(func, "__self__", None) if name == "__get__" else func
    return str(getattr(named, "__name__", name)).strip("_")


def _flat(tree: Any) -> list[Any]:
    """The leaves of nested tuples and lists."""
    return [leaf for item in tree for leaf in _flat(item)] if isinstance(tree, (tuple, list)) else [tree]


def _moved(func: Any, args: Any, kwargs: Any, tensor: Tensor, layout: Layout) -> Layout:
    """The layout after a permutation, which is tried on sizes that differ."""
    moved = func(torch.empty(list(range(2, 2 + tensor.ndim)), device="meta"), *args[1:], **kwargs)
    return Layout(list(moved.shape).index(2 + layout.channel_axis), layout.spatial, layout.grid)


def _reshaped(tensor: Tensor, layout: Layout, value: Tensor) -> Layout | None:
    """The layout after a reshape; None where the channels are divided or joined, or are a single one."""
    channels, before = tensor.shape[layout.channel_axis], tensor.shape[: layout.channel_axis].numel()
    if channels == 1:
        return layout if tensor.shape == value.shape else None
    same = [n for n, side in enumerate(value.shape) if side == channels and value.shape[:n].numel() == before]
    # Joined rows and columns are still positions; divided again, they may be others, unless the grid is known.
    kept = tensor.shape == value.shape or (value.ndim == 3 and len(value) == len(tensor))
    spatial = layout.spatial and (kept or (bool(same) and _is_grid(tensor, layout, value, same[0])))
    return Layout(same[0], spatial, _joined(tensor, layout, value) if spatial else None) if same else None


def _is_grid(tensor: Tensor, layout: Layout, value: Tensor, channel_axis: int) -> bool:
    """Whether a reshape puts tokens without prefix back into their rows and columns."""
    grid, sides = layout.grid, [side for axis, side in enumerate(value.shape) if axis not in (0, channel_axis)]
    return grid is not None and grid.end * tensor.shape[layout.channel_axis] == tensor[0].numel() and sides == [
        grid.rows, grid.columns,
    ]  # fmt: skip


def _joined(tensor: Tensor, layout: Layout, value: Tensor) -> TokenGrid | None:
    """The grid of positions in a reshaped tensor (B, ., .)."""
    if value.ndim != 3 or tensor.shape == value.shape:
        return layout.grid
    sides = [side for axis, side in enumerate(tensor.shape) if axis not in (0, layout.channel_axis)]
    return TokenGrid(*sides) if len(sides) == 2 else None


def _shifted(name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout, value: Tensor) -> Layout:
    """The layout with the grid where a concatenation or a slice has moved it; without one where it is unknown."""
    if layout.grid is None:
        return layout
    axis = 3 - layout.channel_axis
    if tensor.shape[axis] == value.shape[axis]:
        return layout
    moved = None
    if name.startswith(("cat", "concat")) and _axis_of(args, kwargs) % 3 == axis:
        before = [other.shape[axis] for other in args[0][: [id(t) for t in args[0]].index(id(tensor))]]
        moved = layout.grid.prefix + sum(before)
    elif name == "getitem":
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        kept = items[axis] if len(items) > axis and ... not in items else None
        if isinstance(kept, slice) and kept.step in (None, 1):
            moved = layout.grid.prefix - kept.indices(tensor.shape[axis])[0]
    return replace(layout, grid=None if moved is None else replace(layout.grid, prefix=moved))


def _axis_of(args: Any, kwargs: Any) -> int:
    return int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0)))


def _checked(layout: Layout, value: Tensor) -> Layout:
    """The layout without a grid that the tensor cannot hold."""
    if layout.grid is None:
        return layout
    fits = value.ndim == 3 and layout.channel_axis in (1, 2) and layout.grid.fits(value.shape[3 - layout.channel_axis])
    return layout if fits else replace(layout, grid=None)


def _is_slicing(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(isinstance(item, (slice, type(...))) for item in items)


def is_strided(rows: int, columns: int, size: torch.Size) -> bool:
    """Whether one stride s reduces the images' H and W to `rows` and `columns`, up to less than one position each.

    The test is H / s in (rows - 1, rows + 1) and W / s in (columns - 1, columns + 1). It allows for the rounding of
    padded convolutions and poolings, which takes small maps of elongated images far from the images' proportions.
    """
    height, width = size
    return (rows - 1) * width < (columns + 1) * height and (columns - 1) * height < (rows + 1) * width
