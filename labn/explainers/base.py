"""The contract that every explainer keeps, enforced in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.modes import evaluating, explaining, logits_of, matching

Targets = Tensor | Sequence[int] | int | None


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps (B, h, w) to (B, H, W), bilinearly (`align_corners=False`): the one place where maps are resized."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    # In float64, so that what is flat stays flat: rounding within a plateau would order its pixels.
    wide = maps.double().unsqueeze(1)
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False).squeeze(1).to(maps.dtype)


def check_inputs(images: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless images are floating (B, C, H, W) and targets are integer (B,)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images must be a floating tensor (B, C, H, W), got {tuple(images.shape)} {images.dtype}.")
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise InputError(
            f"targets must be integer class indices ({len(images)},), got {tuple(targets.shape)} {targets.dtype}."
        )


@contextmanager
def explained_channels(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Say it in one sentence where a failure is that the images have another number of channels than the model."""
    try:
        yield
    except RuntimeError as error:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.in_channels == images.shape[1]:
            raise
        raise InputError(
            f"images have {images.shape[1]} channels; {type(model).__name__} expects {first.in_channels}."
        ) from error


class Explainer(ABC):
    """A small object built from plain arguments, called as `maps = explainer(model, images, targets)`.

    Subclasses implement `attribute`. The base class runs it in eval mode with gradients allowed, on a model of the
    images' device and dtype, without changing the model, and resizes a low-resolution map bilinearly.
    """

    @property
    def revision(self) -> int:
        """Raised when these arguments come to give other maps than before: results on disk are not taken for them."""
        return 0

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None = None) -> Tensor:
        """Explain a batch.

        Args:
            model: any `nn.Module` that fits the method, returning logits or an object with `.logits`.
            images: (B, C, H, W), normalised as the model expects.
            targets: (B,) int64, the class to explain per image.
            indices: (B,) int64, positions in the data set: the source of per-sample randomness. Without them the
                random methods use one fixed bank for every image.

        Returns:
            (B, H, W) float32 maps on the images' device, not normalised.
        """
        check_inputs(images, targets)
        model = matching(model, images)
        with explaining(model, images.device.type), explained_channels(model, images):
            # Clones: tensors made in inference mode cannot take part in a gradient.
            maps = self.attribute(model, images.detach().clone(), targets.to(images.device).long().clone(), indices)
        return resize_maps(maps.detach(), (images.shape[-2], images.shape[-1])).float()

    def choose_targets(self, model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
        """Classes (B,) int64 to explain: the predicted ones for None, one for all, or one per image.

        Raises:
            ValueError: a target that is no class of the model.
        """

        return resolve_targets(model, images, targets)

    @abstractmethod
    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w) at the method's own resolution; called inside `labn.inference.modes.explaining`."""


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Raise ValueError unless every target is a class index of a model with `num_classes` classes."""
    outside = targets[(targets < 0) | (targets >= num_classes)]
    if len(outside):
        raise InputError(
            f"targets must be from 0 to {num_classes - 1}, the model has {num_classes} classes; got {int(outside[0])}."
        )


def class_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit y_c (B,) of every image's own target.

    Args:
        logits: (B, num_classes).
        targets: (B,) int64.

    Raises:
        ValueError: the logits are not of this shape, or a target is not a class index.
    """
    if logits.ndim != 2 or len(logits) != len(targets):
        raise InputError(
            f"The model returned logits of shape {tuple(logits.shape)}; ({len(targets)}, num_classes) is needed."
        )
    check_targets(targets, logits.shape[1])
    return logits.gather(1, targets[:, None]).squeeze(1)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    model = matching(model, images)
    with torch.no_grad(), evaluating(model, images.device.type), explained_channels(model, images):
        return logits_of(model(images))


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Most probable class (B,) int64 of every image (B, C, H, W)."""
    return _logits(model, images).argmax(dim=1)


def top_k(model: nn.Module, images: Tensor, k: int = 5) -> Tensor:
    """The k most probable classes (B, k) int64, the most probable first.

    Raises:
        ValueError: k is not between 1 and the number of classes.
    """
    logits = _logits(model, images)
    if not 1 <= k <= logits.shape[1]:
        raise InputError(f"k must be from 1 to {logits.shape[1]}, the number of classes; got {k}.")
    return logits.topk(k, dim=1).indices


def resolve_targets(model: nn.Module, images: Tensor, targets: Targets = None) -> Tensor:
    """Targets (B,) int64 on the images' device, however they are given.

    Args:
        model: used where the prediction is asked for.
        images: (B, C, H, W).
        targets: None is every image's predicted class, an integer is the same class for all, else one per image.

    Raises:
        ValueError: not one target per image.
    """
    if targets is None:
        return predictions(model, images)
    if isinstance(targets, int):
        return torch.full((len(images),), targets, dtype=torch.int64, device=images.device)
    given = torch.as_tensor(targets, device=images.device)
    if given.shape != images.shape[:1] or given.is_floating_point():
        raise InputError(f"targets must be {len(images)} class indices, one per image; got {tuple(given.shape)}.")
    return given.long()
