"""The base class of all explainers, which enforces their common contract."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError, InputTypeError
from labn.inference.model_traits import probabilities_sentence, warn_unless_repeating
from labn.inference.modes import evaluating, explaining, matching, run_model

Targets = Tensor | Sequence[int] | int | None


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, h, w) to (B, H, W), bilinearly with `align_corners=False`; no other code resizes maps."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    # In float64, so that a plateau stays flat: rounding within it would order its pixels in an insertion curve.
    wide = maps.double().unsqueeze(1)
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False).squeeze(1).to(maps.dtype)


def check_inputs(images: Tensor, targets: Tensor) -> None:
    """Check that images are floating (B, C, H, W) and targets are integer (B,).

    Raises:
        InputError: either is not.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images must be a floating tensor (B, C, H, W), got {tuple(images.shape)} {images.dtype}.")
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise InputError(
            f"targets must be integer class indices ({len(images)},), got {tuple(targets.shape)} {targets.dtype}."
        )


@contextmanager
def explained_channels(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Replace a RuntimeError within the block by one sentence, if the images have the wrong number of channels.

    Raises:
        InputError: the first convolution of the model expects another number of channels.
    """
    try:
        yield
    except RuntimeError as error:
        # The first registered convolution is the one that reads the images in practically every network.
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.in_channels == images.shape[1]:
            raise
        raise InputError(
            f"images have {images.shape[1]} channels; {type(model).__name__} expects {first.in_channels}."
        ) from error


class Explainer(ABC):
    """An explanation method: a small object with plain arguments, called as `maps = explainer(model, images, targets)`.

    Subclasses implement `attribute`. The base class calls it in eval mode with gradients switched on, on a model of the
    images' device and dtype, without changing the model, and resizes the maps to the images bilinearly.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import Explainer
        >>> class Brightness(Explainer):
        ...     def attribute(self, model, images, targets, indices):
        ...         return images.mean(1)
        >>> Brightness()(nn.Flatten(), torch.ones(1, 3, 2, 2), torch.tensor([0]))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """

    runs_model: ClassVar[bool] = True
    """Whether the method runs the model and needs its logits."""

    @property
    def revision(self) -> int:
        """A number that is raised when the same arguments give other maps than in earlier versions.

        Results on disk with another revision are not reused.
        """
        return 0

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None = None) -> Tensor:
        """Explain a batch.

        Args:
            model: any `nn.Module` that suits the method, which returns logits or an object with `.logits`.
            images: (B, C, H, W), normalised as the model expects.
            targets: (B,) int64, the class to explain per image.
            indices: (B,) int64, positions in the data set, from which per-sample random numbers are drawn. Without
                them, random methods use the same numbers for every image.

        Returns:
            (B, H, W) float32 maps on the images' device, not normalised.

        Raises:
            InputError: images or targets of another shape or dtype, or a model that does not suit the method.
        """
        check_inputs(images, targets)
        if self.runs_model:
            with explained_channels(model, images):
                self.inspect(model, images)
        fitted = self.fitted_to(model)
        model = matching(model, images)
        with explaining(model, images.device.type), explained_channels(model, images):
            # Clones: tensors made in inference mode cannot take part in a gradient.
            classes = targets.to(images.device).long().clone()
            maps = fitted.attribute(model, images.detach().clone(), classes, indices)
        return resize_maps(maps.detach(), (images.shape[-2], images.shape[-1])).float()

    def fitted_to(self, model: nn.Module) -> Explainer:
        """This method in a form that also suits converted copies of `model`; itself where it holds no layers of it."""
        return self

    def for_normalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Explainer:
        """This method for images of a normalisation (None: images in [0, 1]); itself if it does not depend on it."""
        return self

    def with_masks(self, masks: Tensor | None) -> Explainer:
        """This method for the images that the ground-truth masks (B, H, W) bool belong to; itself if it needs none."""
        return self

    def inspect(self, model: nn.Module, images: Tensor) -> None:
        """Warn where two equal calls of the model differ, and where it ends in a softmax.

        The model is run twice on two images, once per model. Methods that need logits override `inspect_output`.
        """
        if warn_unless_repeating(model, images).probabilities:
            self.inspect_output(model)

    def inspect_output(self, model: nn.Module) -> None:
        """Warn that the model returns probabilities in place of logits."""
        warnings.warn(f"{probabilities_sentence(model)} The probability is explained, not the logit.", stacklevel=5)

    def choose_targets(self, model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
        """Classes (B,) int64 to explain: the predicted classes for None, one class for all, or one per image.

        Raises:
            InputError: the number of targets is not the number of images.
        """
        return resolve_targets(model, images, targets)

    @abstractmethod
    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w) at the method's own resolution.

        The base class calls this inside `labn.inference.modes.explaining`, with the arguments of `__call__`; the images
        are a copy without gradients, and model and targets are on their device.
        """


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Check that every target is a class index of a model with `num_classes` classes.

    Raises:
        InputError: a target is outside of 0..num_classes - 1.
    """
    outside = (targets < 0) | (targets >= num_classes)
    if bool(outside.any()):
        first = int(targets[outside][0])
        raise InputError(
            f"targets must be from 0 to {num_classes - 1}, the model has {num_classes} classes; got {first}."
        )


def class_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """The logit y_c (B,) of every image's target.

    Args:
        logits: (B, num_classes).
        targets: (B,) int64.

    Raises:
        InputError: the logits are not of this shape, or a target is not a class index.
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
        return run_model(model, images)


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The most probable class (B,) int64 of every image (B, C, H, W)."""
    return _logits(model, images).argmax(dim=1)


def top_k(model: nn.Module, images: Tensor, k: int = 5) -> Tensor:
    """The k most probable classes (B, k) int64, the most probable first.

    Raises:
        InputError: k is not between 1 and the number of classes.
    """
    logits = _logits(model, images)
    if not 1 <= k <= logits.shape[1]:
        raise InputError(f"k must be from 1 to {logits.shape[1]}, the number of classes; got {k}.")
    return logits.topk(k, dim=1).indices


def resolve_targets(model: nn.Module, images: Tensor, targets: Targets = None) -> Tensor:
    """Targets (B,) int64 on the images' device, however they are given.

    Args:
        model: run if the predicted classes are asked for.
        images: (B, C, H, W).
        targets: None for every image's predicted class, an integer for one class for all, or one class per image.

    Raises:
        InputError: the number of targets is not the number of images.
    """
    if targets is None:
        return predictions(model, images)
    if isinstance(targets, int):
        return torch.full((len(images),), targets, dtype=torch.int64, device=images.device)
    if isinstance(targets, str):
        raise InputTypeError(f"targets is {targets!r}; class indices are needed, such as 3 or torch.tensor([3, 5]).")
    if isinstance(targets, np.ndarray):
        targets = np.ascontiguousarray(targets)  # torch takes no arrays that are read backwards
    classes = torch.as_tensor(targets, device=images.device)
    if classes.ndim == 0:
        classes = classes.expand(len(images))
    if classes.shape != images.shape[:1] or classes.is_floating_point():
        raise InputError(
            f"targets must be {len(images)} class indices, one per image; got {tuple(classes.shape)} {classes.dtype}."
        )
    return classes.long()
