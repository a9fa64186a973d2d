"""Base classes of the metrics: one row (index, values) per sample, with equal digits on any number of ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from labn.errors import InputError, InputTypeError
from labn.explainers.base import Explainer
from labn.metrics.sample_table import SampleTable
from labn.metrics.scores import SampleScores
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.scene import Scene

Boxes = Sequence[Tensor] | Tensor


def as_tensor(name: str, values: Any) -> Tensor:
    """A tensor from a tensor, an array or nested lists.

    Args:
        name: name of the argument for the error message.
        values: the argument.

    Raises:
        InputTypeError: values that torch cannot convert.
    """
    if isinstance(values, np.ndarray):
        values = np.ascontiguousarray(values)  # torch takes no arrays that are read backwards
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{type(values).__name__} (torch: {error})"
        raise InputTypeError(f"{name} must be a tensor, an array or lists of numbers, got {what}.") from error


@dataclass(frozen=True)
class ScoredBatch:
    """Input of a metric for one batch; the fields are the arguments of `SampleMetric.score`.

    Raises:
        InputError: maps, labels, masks or boxes that do not fit the images, or a map with NaN or infinity.
        InputTypeError: a field that is neither tensor, array nor lists of numbers.

    Example:
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2)
        >>> batch = ScoredBatch(model, images, maps=[[[1, 2], [3, 4]]], targets=[1], indices=[0])
        >>> batch.maps.shape, batch.targets
        (torch.Size([1, 2, 2]), tensor([1]))
    """

    model: nn.Module
    images: Tensor
    maps: Tensor
    targets: Tensor
    indices: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    boxes: Boxes | None = None
    explainer: Any = None
    cache: PerturbationEngine | None = None
    predictions: Tensor | None = None
    scenes: Sequence[Scene] | None = None

    def __post_init__(self) -> None:
        for name in ("maps", "targets", "indices", "labels", "masks", "predictions"):
            if getattr(self, name) is not None:
                self._set(name, as_tensor(name, getattr(self, name)))
        if self.boxes is not None and not isinstance(self.boxes, Tensor):
            self._set("boxes", [_corners(boxes) for boxes in self.boxes])
        if self.maps.dtype == torch.bool:
            self._set("maps", self.maps.to(self.images.dtype))
        self._check_shapes()
        self._classes_to_int64()
        self._set("maps", self.maps.detach())
        broken = self.indices.to(self.maps.device)[~self.maps.isfinite().flatten(1).all(1)].tolist()
        if broken:
            raise InputError(f"maps must be finite; the map of sample {broken[0]} holds NaN or infinity.")

    def _set(self, name: str, value: Any) -> None:
        # The documented way to fill a field of a frozen dataclass in its __post_init__.
        object.__setattr__(self, name, value)

    def _check_shapes(self) -> None:
        expected = (len(self.images), *self.images.shape[-2:])
        if self.maps.shape != expected:
            raise InputError(f"maps must be {expected} to fit the images, got {tuple(self.maps.shape)}; resize them.")
        for name in ("targets", "indices", "labels", "predictions"):
            values = getattr(self, name)
            if values is not None and values.shape != expected[:1]:
                raise InputError(f"{name} must have one entry per image {expected[:1]}, got {tuple(values.shape)}.")
        if self.masks is not None and self.masks.shape != expected:
            raise InputError(f"masks must be {expected} to fit the images, got {tuple(self.masks.shape)}.")
        if self.boxes is not None and len(self.boxes) != len(self.images):
            raise InputError(f"boxes must have one entry per image {expected[:1]}, got {len(self.boxes)}.")

    def _classes_to_int64(self) -> None:
        for name in ("targets", "labels"):
            classes = getattr(self, name)
            if classes is not None and (classes.is_floating_point() or classes.is_complex()):
                raise InputError(f"{name} must be class indices, got {classes.dtype}.")
            self._set(name, None if classes is None else classes.long())

    @property
    def true_labels(self) -> Tensor:
        """Labels (B,) on the images' device; the targets where no labels were given."""
        return (self.targets if self.labels is None else self.labels).to(self.images.device)

    def predicted(self, engine: PerturbationEngine) -> Tensor:
        """Predicted classes (B,) on the images' device; from `engine`, in its precision, where none were given."""
        return engine.original().argmax(-1) if self.predictions is None else self.predictions.to(self.images.device)

    def explain_again(
        self, images: Tensor, targets: Tensor, model: nn.Module | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Maps (n, H, W) of other images, classes or weights by the explainer, which gets the samples' masks.

        Args:
            images: (n, C, H, W), one per sample.
            targets: (n,) classes.
            model: None: the model of the batch.
            rows: positions of the n samples in the batch; None: all.
        """
        indices, masks, explainer = self.indices, self.masks, self.explainer
        if rows is not None:
            indices = indices[rows.to(indices.device)]
            masks = None if masks is None else masks[rows.to(masks.device)]
        if isinstance(explainer, Explainer) and masks is not None:
            explainer = explainer.with_masks(masks)
        return explainer(self.model if model is None else model, images, targets, indices)

    def engine(self, **options: Any) -> PerturbationEngine:
        """The engine in `cache`, or a new one with `options`.

        Raises:
            InputError: an engine of other images.
        """
        if self.cache is None:
            return PerturbationEngine.for_model(self.model, self.images, indices=self.indices, **options)
        if self.cache.images.shape != self.images.shape or not torch.equal(self.cache.images, self.images):
            raise InputError("cache must be a perturbation engine of these images; it holds other images.")
        return self.cache


def _corners(boxes: Any) -> Tensor:
    """Boxes of one sample as a tensor (n, 4); an empty list becomes (0, 4)."""
    tensor = as_tensor("boxes", boxes)
    return tensor.new_zeros(0, 4) if tensor.shape == (0,) else tensor


def check_explainer(batch: ScoredBatch, metric: str, purpose: str) -> None:
    """Raise InputError where the batch has no explainer.

    Args:
        batch: the scored batch.
        metric: name of the metric for the message.
        purpose: what the metric explains, such as "explains a randomised copy of the model".
    """
    if batch.explainer is None:
        raise InputError(f"metric {metric!r} {purpose}: it needs explainer=, the method that made the maps.")


class SampleRows(Metric):
    """Metric state of one row (index, values) per sample, with equal digits on any number of ranks.

    Args:
        names: names of the values.
        kwargs: arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        # One flat state: the empty tensor of a rank without samples then fits those of the others in torch's gather.
        self.add_state("rows", [], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """float64, also for the empty state of a rank without samples; `Metric.to` does not change it."""
        return torch.float64

    def append(self, indices: Tensor, scores: dict[str, Tensor]) -> None:
        """Add the rows of a batch to the state.

        Args:
            indices: (B,) int64, positions in the data set.
            scores: name -> (B,) values, one entry per name.
        """
        columns = [indices, *(scores[name] for name in self.names)]
        table = torch.stack([column.to(self.device, torch.float64) for column in columns], dim=1)
        self.rows.append(table.flatten())
        # torchmetrics wraps `update` to reset the cached result; callers of `append` alone need the same.
        self._computed, self._update_count = None, self._update_count + 1

    def per_sample(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Sorted sample indices (n,) int64 and name -> values (n,) float64, each sample once."""
        rows = dim_zero_cat(self.rows) if len(self.rows) else torch.empty(0, dtype=torch.float64, device=self.device)
        indices, *columns = rows.view(-1, 1 + len(self.names)).cpu().numpy().T
        # A distributed sampler repeats samples to fill the last batch; the table counts each once.
        merged = SampleTable(np.unique(indices.astype(np.int64)), len(self.names))
        merged.add(indices.astype(np.int64), dict(enumerate(columns)))
        values = torch.from_numpy(merged.values).to(self.device)
        return torch.from_numpy(merged.index).to(self.device), dict(zip(self.names, values))


class SampleMetric(SampleRows):
    """Base of the metrics with one value per sample and name; `compute` returns the means.

    Subclasses pass `names` to the constructor and implement `score_batch`. NaN leaves a sample out of the mean.

    Attributes:
        counts_samples: whether `compute` returns numbers of samples in place of means; results folders keep these in a
            table of their own.
        needs_regions: whether the metric compares the map with ground-truth masks or boxes.
        needs_scenes: whether the metric draws the images again, from the scenes of the data.

    Example:
        >>> class MeanRelevance(SampleMetric):
        ...     def __init__(self):
        ...         super().__init__(["mean_relevance"])
        ...     def score_batch(self, batch):
        ...         return SampleScores({"mean_relevance": batch.maps.mean((1, 2))})
        >>> metric, images = MeanRelevance(), torch.zeros(2, 1, 2, 2)
        >>> maps = torch.tensor([[[0.0, 1.0], [1.0, 2.0]], [[3.0, 3.0], [3.0, 3.0]]])
        >>> metric.update(nn.Identity(), images, maps, torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> metric.compute()
        {'mean_relevance': tensor(2., dtype=torch.float64)}
    """

    counts_samples = False
    needs_regions = False
    needs_scenes = False

    @property
    def revision(self) -> int:
        """Version of the metric's definition; a results folder does not reuse scores of another revision."""
        return 0

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where images of this (height, width) cannot be scored."""

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError, before any forward, where the batch lacks an input that the metric needs."""
        self.check_size((batch.images.shape[-2], batch.images.shape[-1]))

    @abstractmethod
    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch: one (B,) tensor per entry of `names`, NaN where a sample is left out, and curves if any."""

    def score(
        self,
        model: nn.Module,
        images: Tensor,
        maps: Tensor,
        targets: Tensor,
        indices: Tensor,
        *,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        boxes: Boxes | None = None,
        explainer: Any = None,
        cache: PerturbationEngine | None = None,
        predictions: Tensor | None = None,
        scenes: Sequence[Scene] | None = None,
    ) -> dict[str, Tensor]:
        """Score a batch; the state does not change.

        Args:
            model: returns logits or an object with `.logits`.
            images: (B, C, H, W), normalised.
            maps: (B, H, W), at the images' size.
            targets: (B,) int64, the explained classes.
            indices: (B,) int64, positions in the data set.
            labels: (B,) int64, the true classes; None: the targets.
            masks: (B, H, W) bool ground-truth regions, where the data has them.
            boxes: per sample (n, 4) ground-truth boxes x1, y1, x2, y2 in pixels, where the data has them.
            explainer: the method that made the maps, for metrics that explain again.
            cache: perturbation engine of the batch, through which metrics share their forwards.
            predictions: (B,) int64, the predicted classes, for example in full precision; None: computed by the engine.
            scenes: per sample the objects that the image was drawn from, where the data has them.

        Returns:
            One (B,) float64 tensor per entry of `names`; NaN where the sample is left out.

        Raises:
            InputError: a map with NaN or infinity (named by its index) or of another size than the images, or a missing
                input that the metric needs (masks, an explainer).
        """
        more = (labels, masks, boxes, explainer, cache, predictions, scenes)
        batch = ScoredBatch(model, images, maps, targets, indices, *more)
        self.check(batch)
        return self.score_batch(batch).values

    def update(
        self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, indices: Tensor, **more: Any
    ) -> None:
        """Score a batch and add the rows to the state; arguments as in `score`."""
        self.append(indices, self.score(model, images, maps, targets, indices, **more))

    def reduce(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reduce per-sample values (n,) per name to the result of `compute`: their mean without the NaN."""
        return {name: column[~column.isnan()].mean() for name, column in values.items()}

    def compute(self) -> dict[str, Tensor]:
        """Mean per name over the samples that are not left out, float64; NaN without samples."""
        return self.reduce(self.per_sample()[1])
