"""Which class is explained: the label, the prediction, a given index, or the k most probable ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.explainers.base import Targets, explained_channels
from labn.inference import evaluating, logits_of, matching


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Raise ValueError unless every target is a class index of a model with `num_classes` classes."""
    outside = targets[(targets < 0) | (targets >= num_classes)]
    if len(outside):
        raise ValueError(
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
        raise ValueError(
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
        raise ValueError(f"k must be from 1 to {logits.shape[1]}, the number of classes; got {k}.")
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
        raise ValueError(f"targets must be {len(images)} class indices, one per image; got {tuple(given.shape)}.")
    return given.long()
