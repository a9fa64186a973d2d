"""The public API: explain a model's predictions and score the explanations, in three lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError, InputTypeError
from labn.explainers.base import Explainer, Targets, explained_channels, resolve_targets
from labn.explainers.registry import explainer_by_name
from labn.metrics.base import Boxes, ScoredBatch
from labn.metrics.registry import check_settings, metric_by_name, values_named
from labn.perturbation.engine import PerturbationEngine

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns.

    Attributes:
        maps: (B, H, W) float32, not normalised, signed where the method is.
        targets: (B,) int64, the classes that were explained.
        method: the method's name, or its class where an explainer was given.
    """

    maps: Tensor
    targets: Tensor
    method: str


def explain(
    model: nn.Module,
    images: Tensor,
    method: str | Explainer = "lrp",
    targets: Targets = None,
    *,
    indices: Tensor | None = None,
    **arguments: Any,
) -> Explanation:
    """Explain a batch of images; nothing about the model is changed.

    Args:
        model: any `nn.Module` (own, timm, torchvision) that returns logits or an object with `.logits`.
        images: (B, C, H, W), normalised as the model expects; they decide device and dtype.
        method: a name of `labn.explainers.EXPLAINERS`, a leading `-` negating its map; or a ready explainer.
        targets: None, every image's predicted class; an integer, one class for all; or (B,) classes.
        indices: (B,) int64 positions in a data set, from which random methods take their randomness per sample; None:
            the same for all.
        arguments: of the explainer, as in `method="rise", n_masks=2000`.

    Raises:
        ValueError: unknown method, images that are no batch or hold no image, targets out of range, or a model that the
            method does not fit.
        TypeError: images that are no tensor, an argument that the method does not have, or any beside a ready
            explainer.
    """
    _check_images(images)
    if not isinstance(method, str) and arguments:
        raise InputTypeError(f"a ready {type(method).__name__} takes no more arguments, got {', '.join(arguments)}.")
    explainer = explainer_by_name(method, **arguments) if isinstance(method, str) else method
    chosen = explainer.choose_targets(model, images, targets)
    maps = explainer(model, images, chosen, indices)
    return Explanation(maps, chosen, method if isinstance(method, str) else type(method).__name__)


def evaluate(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Targets = None,
    metrics: Sequence[str] = ("pid16", "id"),
    *,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    explainer: Explainer | str | None = None,
    indices: Tensor | None = None,
    mean: Sequence[float] | None = IMAGENET_MEAN,
    std: Sequence[float] | None = IMAGENET_STD,
    chunk_size: int | None = None,
    fold: bool = True,
    precision: str = "fp32",
    **settings: Any,
) -> dict[str, Tensor]:
    """Score maps with several metrics, which share their forwards.

    Args:
        model: the model that was explained.
        images: (B, C, H, W), normalised with `mean` and `std`.
        maps: (B, H, W), for example `explain(...).maps`; tensors here may also be arrays or lists, of `bool` too.
        targets: the explained classes, as for `explain`.
        metrics: names that `labn.metrics.metric_by_name` knows.
        labels: (B,) true classes; None: the targets.
        masks: (B, H, W) bool ground-truth regions, for the metrics that need them.
        boxes: per sample (n, 4) boxes x1, y1, x2, y2 in pixels, likewise.
        explainer: what made the maps, for metrics that explain again; a name takes the method with its defaults.
        indices: (B,) int64 positions in a data set; None: 0..B-1.
        mean: per-channel mean of the normalisation; None: the images were not normalised.
        std: likewise the standard deviation.
        chunk_size: images per forward; None lets the engine choose.
        fold: whether the forwards may run on a BatchNorm-folded copy, where that is exact.
        precision: of the forwards, "fp32" (the images' own) or "bf16".
        settings: for all metrics that know them, such as `fill="blur"`.

    Returns:
        metric name -> (B,) float64 on the images' device; NaN where a metric leaves a sample out. `pctin` stands for
        several values and gives each under its own name.

    Raises:
        ValueError: an unknown metric, no image, maps, masks or boxes that do not fit the images, or a metric that needs
            masks or an explainer and gets none; before anything is scored.
        TypeError: a setting that none of the metrics knows or that their names say already, images that are no tensor,
            maps, labels, masks or boxes that are no numbers, or one name instead of a list.
    """
    _check_images(images)
    if isinstance(metrics, str):
        raise InputTypeError(f"metrics is {metrics!r}; it must be a list of names, such as [{metrics!r}].")
    check_settings(metrics, settings)
    built = {name: metric_by_name(name, **_normalisation(images, mean, std), **settings) for name in metrics}
    places = torch.arange(len(images)) if indices is None else indices
    maker = explainer_by_name(explainer) if isinstance(explainer, str) else explainer
    # Without indices `explain` gave random methods none either.
    again = maker if maker is None or indices is not None else _without_indices(maker)
    with explained_channels(model, images):
        how: dict[str, Any] = {"chunk_size": chunk_size, "fold": fold, "precision": precision}
        engine = PerturbationEngine.for_model(model, images, indices=places, **how)
        # Classes are those of the model as it is, whatever the precision of the forwards.
        known = None if precision == "fp32" else resolve_targets(model, images)
        if targets is None:
            targets = engine.original().argmax(1) if known is None else known
        chosen = resolve_targets(model, images, targets)
        batch = ScoredBatch(model, images, maps, chosen, places, labels, masks, boxes, again, engine, known)
        for metric in built.values():
            metric.check(batch)
        scores: dict[str, Tensor] = {}
        for name, metric in built.items():
            found = metric.score_batch(batch).values
            scores |= {key: found[value] for key, value in values_named(name, metric).items()}
    return {name: score.to(images.device) for name, score in scores.items()}


def _without_indices(explainer: Explainer) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    return lambda model, images, targets, indices: explainer(model, images, targets)


def _check_images(images: Tensor) -> None:
    """Refuse what is no batch of images, before a model fails on it in words of its own."""
    if not isinstance(images, Tensor):
        raise InputTypeError(
            f"images must be a tensor (B, C, H, W), got {type(images).__name__}; see torch.from_numpy."
        )
    if not images.is_floating_point():
        raise InputTypeError(
            f"images are {images.dtype}; they must be floating point, normalised as the model expects."
        )
    if images.ndim != 4:
        alone = "; a single image goes in as image[None]" if images.ndim == 3 else ""
        raise InputError(f"images must be (B, C, H, W), got {tuple(images.shape)}{alone}.")
    if not len(images):
        raise InputError("images holds no image; give at least one.")


def _normalisation(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Sequence[float] | None]:
    """The settings `mean` and `std`; ImageNet's defaults need images of three channels."""
    if images.shape[1] != len(IMAGENET_MEAN) and (mean is IMAGENET_MEAN or std is IMAGENET_STD):
        raise InputError(
            f"images have {images.shape[1]} channels; give mean and std as they were normalised (None: not at all)."
        )
    return {"mean": mean, "std": std}
