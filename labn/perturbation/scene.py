"""Scenes: images that a program draws from objects, and draws again without some of these objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError


@dataclass(frozen=True)
class Scene:
    """A drawn image as a list of objects; data modules such as `datamodules.SyntheticFundus` make it.

    An image that is drawn again without an object is the image as it would have been, without a fill and without
    anything that the network has not seen in training. Everything else of the image stays identical to the byte.

    Attributes:
        names: names of the O objects.
        masks: (O, H, W) bool, the pixels of every object; objects do not share a pixel.
        draw: kept objects (O,) bool -> image (C, H, W), normalised as the network expects.

    Raises:
        InputError: masks that are not (O, H, W) bool, or have another number of objects than the names.

    Example:
        >>> masks = torch.eye(2, dtype=torch.bool).view(2, 1, 2)
        >>> scene = Scene(("left", "right"), masks, lambda kept: (masks * kept.view(2, 1, 1)).sum(0)[None].float())
        >>> scene.images(torch.tensor([[True, True], [True, False]]))
        tensor([[[[1., 1.]]],
                [[[1., 0.]]]])
    """

    names: tuple[str, ...]
    masks: Tensor
    draw: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != torch.bool or len(self.masks) != len(self.names):
            raise InputError(
                f"masks must be ({len(self.names)}, H, W) bool, one per object; got {tuple(self.masks.shape)} "
                f"{self.masks.dtype}."
            )

    def images(self, kept: Tensor) -> Tensor:
        """Images (K, C, H, W) that show the objects `kept` (K, O) bool and no others."""
        return torch.stack([self.draw(objects) for objects in kept])
