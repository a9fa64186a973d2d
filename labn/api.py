"""Public API: explain the predictions of a model and score the explanations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from labn import metrics as known
from labn.errors import InputError, InputTypeError
from labn.explainers.base import Explainer, Targets, explained_channels, resolve_targets
from labn.explainers.explanation import Explanation, Explanations
from labn.explainers.registry import explainer_by_name
from labn.inference.model_traits import probabilities_sentence, warn_unless_repeating
from labn.io.images import to_square
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.scene import Scene

if TYPE_CHECKING:
    from labn.metrics.base import Boxes
    from labn.metrics.scores import Scores, ScoresByMethod

READS_OUTPUT = ("identity", "logit")
"""Settings of `probability` under which scores read the output of a model as it is."""


@overload
def explain(
    model: nn.Module,
    images: Tensor,
    method: str | Explainer | type[Explainer] = ...,
    targets: Targets = ...,
    *,
    indices: Tensor | None = ...,
    **arguments: Any,
) -> Explanation: ...


@overload
def explain(
    model: nn.Module,
    images: Tensor,
    method: list[str] | tuple[str, ...],
    targets: Targets = ...,
    *,
    indices: Tensor | None = ...,
) -> Explanations: ...


def explain(
    model: nn.Module,
    images: Tensor,
    method: str | Explainer | type[Explainer] | list[str] | tuple[str, ...] = "lrp",
    targets: Targets = None,
    *,
    indices: Tensor | None = None,
    **arguments: Any,
) -> Explanation | Explanations:
    """Explain a batch of images; the model's weights, mode and hooks stay as they are.

    Args:
        model: an `nn.Module` (own, timm, torchvision) that returns logits or an object with `.logits`.
        images: (B, C, H, W), normalised as the model expects; their device and dtype are those of the computation.
            `labn.prepare` makes them from pictures.
        method: a name of `labn.explainers.EXPLAINERS`, with a leading `-` for the negated map; a ready explainer, or
            the class of one; or a list of names, which gives a dict of explanations.
        targets: None for the predicted class of every image; an integer for all images; or (B,) classes.
        indices: (B,) int64 positions in a data set, which seed random methods per sample; None: the same randomness for
            all samples.
        arguments: arguments of the explainer, as in `method="rise", n_masks=2000`.

    Returns:
        An `Explanation`; for a list of methods `Explanations`, a dict of name -> `Explanation`. Both have `plot` and
        `save`.

    Raises:
        InputError: an unknown method, images that are not (B, C, H, W) with B >= 1 or hold NaN, targets out of range,
            or a model that the method does not support.
        InputTypeError: a model that is no `nn.Module`, images that are not a floating-point tensor, an argument that
            the method does not have, or arguments beside a ready explainer or several methods.

    Example:
        >>> model, images = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(8), nn.Flatten()), torch.rand(1, 3, 8, 8)
        >>> explain(model, images, "gradcam", targets=1).maps.shape
        torch.Size([1, 8, 8])
        >>> list(explain(model, images, ["gradcam", "-gradcam"], targets=1))
        ['gradcam', '-gradcam']
    """
    _check_model(model)
    _check_images(images)
    _warn_of_pixels(images)
    if isinstance(method, (list, tuple)):
        if arguments:
            raise InputTypeError(
                f"{', '.join(arguments)} cannot be given to several methods; explain them one by one, or give ready "
                "explainers."
            )
        return Explanations(
            {name: explain(model, images, name, targets, indices=indices) for name in dict.fromkeys(method)}
        )
    if isinstance(method, type) and issubclass(method, Explainer):
        method = method(**arguments)
    elif not isinstance(method, str) and arguments:
        raise InputTypeError(f"a ready {type(method).__name__} takes no more arguments, got {', '.join(arguments)}.")
    elif not isinstance(method, str) and not callable(method):
        raise InputTypeError(
            f"method is a {type(method).__name__}; it must be a name, an explainer, or a list of names."
        )
    explainer: Any = explainer_by_name(method, **arguments) if isinstance(method, str) else method
    classes = explainer.choose_targets(model, images, targets)
    maps = explainer(model, images, classes, indices)
    return Explanation(maps, classes, method if isinstance(method, str) else type(method).__name__, images)


@overload
def evaluate(
    model: nn.Module,
    images: Tensor,
    maps: Explanations,
    targets: Targets = ...,
    metrics: Sequence[str] = ...,
    **settings: Any,
) -> ScoresByMethod: ...


@overload
def evaluate(
    model: nn.Module,
    images: Tensor,
    maps: Any,
    targets: Targets = ...,
    metrics: Sequence[str] = ...,
    **settings: Any,
) -> Scores: ...


def evaluate(
    model: nn.Module,
    images: Tensor,
    maps: Tensor | Explanation | Explanations,
    targets: Targets = None,
    metrics: Sequence[str] = ("pid16", "id"),
    *,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
    boxes: Boxes | None = None,
    scenes: Sequence[Scene] | None = None,
    explainer: Explainer | str | None = None,
    indices: Tensor | None = None,
    mean: Sequence[float] | None = IMAGENET_MEAN,
    std: Sequence[float] | None = IMAGENET_STD,
    chunk_size: int | None = None,
    fold: bool = True,
    precision: str = "fp32",
    **settings: Any,
) -> Scores | ScoresByMethod:
    """Score maps with several metrics; the metrics share their forwards.

    Args:
        model: the explained model.
        images: (B, C, H, W), normalised with `mean` and `std`.
        maps: (B, H, W) or (B, 1, H, W), or the result of `explain`, whose targets are then taken. This and the next
            arguments may be tensors, arrays or lists, also of bool.
        targets: the explained classes, as for `explain`.
        metrics: metric names, see `labn.metrics.metric_by_name`.
        labels: (B,) true classes; None: the targets.
        masks: (B, H, W) bool ground-truth regions, for metrics that compare with them.
        boxes: per sample (n, 4) boxes x1, y1, x2, y2 in pixels, for the same metrics.
        scenes: per sample the objects that the image was drawn from, for `scene`; `datamodules.SyntheticFundus` and
            `SyntheticRelations` give them.
        explainer: the method that made the maps, for metrics that explain again; a name stands for the method with its
            default arguments.
        indices: (B,) int64 positions in a data set; None: 0 to B - 1.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        chunk_size: images per forward; None lets the engine choose.
        fold: whether the forwards may run on a BatchNorm-folded copy, where that is exact.
        precision: precision of the forwards, "fp32" (the dtype of the images) or "bf16".
        settings: settings for all metrics that have them, such as `fill="blur"`.

    Returns:
        `Scores`, a dict of metric name -> (B,) float64 on the images' device that prints as a table; NaN where a metric
        leaves a sample out. `pctin` returns each of its values under its own name. For `Explanations` of several
        methods `ScoresByMethod`, a dict of method -> `Scores`.

    Raises:
        InputError: an unknown metric, an empty batch, maps, masks or boxes that do not fit the images, or a metric that
            lacks its masks or explainer. All inputs are checked before the first score.
        InputTypeError: a setting without effect on any of the metrics, images that are not a floating-point tensor,
            maps, labels, masks or boxes that are not numbers, or one name in place of a list.

    Example:
        >>> model, images = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(8), nn.Flatten()), torch.rand(1, 3, 8, 8)
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[:, :4] = 1.0
        >>> evaluate(model, images, maps, metrics=["sparseness", "pointing"], masks=maps.bool())
        1 samples  sparseness  pointing
        mean           0.5000    1.0000
    """
    if isinstance(maps, Explanations):
        if explainer is not None:
            raise InputTypeError("explainer belongs to one method; score the explanations one by one to give it.")
        shared: dict[str, Any] = {"labels": labels, "masks": masks, "boxes": boxes, "scenes": scenes}
        shared |= {"indices": indices}
        shared |= {"mean": mean, "std": std, "chunk_size": chunk_size, "fold": fold, "precision": precision, **settings}
        return known.ScoresByMethod(
            {name: evaluate(model, images, one, targets, metrics, **shared) for name, one in maps.items()}
        )
    _check_model(model)
    _check_images(images)
    _warn_unless_normalised(images, mean, std)
    plain, targets = _maps_and_targets(maps, targets)
    if isinstance(metrics, str):
        raise InputTypeError(f"metrics is {metrics!r}; it must be a list of names, such as [{metrics!r}].")
    known.check_settings(metrics, settings)
    built = {name: known.metric_by_name(name, **_normalisation(images, mean, std), **settings) for name in metrics}
    positions = torch.arange(len(images)) if indices is None else indices
    method = explainer_by_name(explainer) if isinstance(explainer, str) else explainer
    if isinstance(method, Explainer):
        # Copies of the model have other layers than the one that the method may name.
        method = method.for_normalised(mean, std).fitted_to(model)
    # `explain` without indices used one randomness for all samples; a second explanation must do the same.
    explain_again = method if method is None or indices is not None else _WithoutIndices(method)
    with explained_channels(model, images):
        if warn_unless_repeating(model, images).probabilities and settings.get("probability") not in READS_OUTPUT:
            raise InputError(f"{probabilities_sentence(model)} Or read them as given with probability='identity'.")
        engine = PerturbationEngine.for_model(
            model, images, indices=positions, chunk_size=chunk_size, fold=fold, precision=precision
        )
        # Predicted classes are those of the full-precision model, also where the forwards run in bfloat16.
        predictions = None if precision == "fp32" else resolve_targets(model, images)
        if targets is None:
            targets = engine.original().argmax(1) if predictions is None else predictions
        classes = resolve_targets(model, images, targets)
        batch = known.ScoredBatch(
            model, images, plain, classes, positions, labels, masks, boxes, explain_again, engine, predictions, scenes
        )
        scores = _scores(built, batch)
    return known.Scores({name: score.to(images.device) for name, score in scores.items()})


def _maps_and_targets(maps: Any, targets: Targets) -> tuple[Any, Targets]:
    """Maps (B, H, W) and targets of an `Explanation`, or of maps with a channel."""
    if isinstance(maps, Explanation):
        maps, targets = maps.maps, maps.targets if targets is None else targets
    return (maps.squeeze(1) if isinstance(maps, Tensor) and maps.ndim == 4 and maps.shape[1] == 1 else maps), targets


def _scores(built: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
    """Scores of the batch by every metric, under the names of their values."""
    # All checks come before the first score, which may take minutes.
    for metric in built.values():
        metric.check(batch)
    scores: dict[str, Tensor] = {}
    for name, metric in built.items():
        values = metric.score_batch(batch).values
        scores |= {key: values[value] for key, value in known.values_named(name, metric).items()}
    return scores


class _WithoutIndices(Explainer):
    """A method that uses the same random numbers for every image; its explainer has made all checks."""

    runs_model = False

    def __init__(self, explainer: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        self.explainer = explainer

    def with_masks(self, masks: Tensor | None) -> Explainer:
        """The explainer with the masks, if it is one of this project's."""
        return _WithoutIndices(self.explainer.with_masks(masks)) if isinstance(self.explainer, Explainer) else self

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        return self.explainer(model, images, targets)


def _check_images(images: Tensor) -> None:
    """Raise an error unless `images` is a floating-point tensor (B, C, H, W) with B >= 1."""
    if not isinstance(images, Tensor):
        raise InputTypeError(
            f"images must be a tensor (B, C, H, W), got {type(images).__name__}; labn.prepare makes it from pictures."
        )
    if not images.is_floating_point():
        raise InputTypeError(
            f"images are {images.dtype}; they must be floating point, normalised as the model expects."
        )
    if images.ndim != 4:
        hint = "; a single image goes in as image[None]" if images.ndim == 3 else ""
        raise InputError(f"images must be (B, C, H, W), got {tuple(images.shape)}{hint}.")
    if not len(images):
        raise InputError("images is an empty batch; give at least one image.")
    broken = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(f"images must be finite; image {broken[0]} holds NaN or infinity.")


def _check_model(model: nn.Module) -> None:
    """Raise an error unless `model` is an `nn.Module`."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        raise InputTypeError(
            f"model is the name {model!r}; pass the network itself, as of timm.create_model({model!r})."
        )
    if callable(model):
        raise InputTypeError("model is a function; write it as the forward of an nn.Module, whose layers can be seen.")
    raise InputTypeError(f"model is a {type(model).__name__}; it must be an nn.Module.")


def _warn_of_pixels(images: Tensor) -> None:
    """Warn where images are pixels from 0 to 255, for which no usual network is made."""
    low, high = float(images.min()), float(images.max())
    if low >= 0.0 and high > 10.0:
        warnings.warn(
            f"images lie between {low:.3g} and {high:.3g}, as if they were pixels; labn.prepare normalises them.",
            stacklevel=3,
        )


def _warn_unless_normalised(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Warn where images cannot have been normalised with ImageNet's mean and standard deviation, the defaults."""
    if mean is not IMAGENET_MEAN or std is not IMAGENET_STD:
        return
    low, high = float(images.min()), float(images.max())
    # Normalised with ImageNet's figures, values lie between -2.12 and 2.64, and black and white are never both inside
    # [0, 1]; a constant image says nothing.
    if high > 3.0 or (low >= 0.0 and high <= 1.0 and high > low):
        warnings.warn(
            f"images lie between {low:.3g} and {high:.3g}, as if they were not normalised with ImageNet's mean and "
            "std; give mean and std of their normalisation (None: in [0, 1]).",
            stacklevel=3,
        )


def prepare(
    pictures: Any,
    size: int = 224,
    *,
    shorter: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Normalised images from pictures, as `explain` and `evaluate` expect them.

    Args:
        pictures: a path, a PIL image or an array (H, W, 3) uint8, or a list of these.
        size: side of the square in pixels.
        shorter: None squashes a picture to the square; else its shorter side is resized to this and the middle taken.
        mean: per-channel mean of the normalisation, of values in [0, 1].
        std: per-channel standard deviation.

    Returns:
        (B, 3, size, size) float32.

    Raises:
        InputError: a file that cannot be decoded.
        InputTypeError: something that is no picture.

    Example:
        >>> from PIL import Image
        >>> prepare(Image.new("RGB", (40, 30)), size=32).shape
        torch.Size([1, 3, 32, 32])
    """
    preprocessing = Preprocessing(size, mean, std, shorter=shorter)
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    return torch.stack([preprocessing.normalise(_pixels(picture, preprocessing)) for picture in listed])


def _pixels(picture: Any, preprocessing: Preprocessing) -> np.ndarray:
    """(size, size, 3) uint8 of one picture."""
    if isinstance(picture, (str, os.PathLike)):
        return preprocessing.read(Path(picture))
    pixels = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputTypeError(
            f"a picture is a {type(picture).__name__} of {pixels.dtype} {pixels.shape}; it must be a path, a PIL image "
            "or an array (H, W, 3) uint8."
        )
    return to_square(pixels, preprocessing.image_size, preprocessing.shorter)


def _normalisation(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Sequence[float] | None]:
    """Settings `mean` and `std`; raises InputError where ImageNet's defaults meet images without three channels."""
    if images.shape[1] != len(IMAGENET_MEAN) and (mean is IMAGENET_MEAN or std is IMAGENET_STD):
        raise InputError(
            f"images have {images.shape[1]} channels; give mean and std of their normalisation (None: in [0, 1])."
        )
    return {"mean": mean, "std": std}
