"""What all per-sample metrics share: rows of (index, values), merged to the same digits on any number of ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from labn.errors import InputError, InputTypeError
from labn.metrics.sample_table import SampleTable
from labn.perturbation.engine import PerturbationEngine

Boxes = Sequence[Tensor] | Tensor


def as_tensor(name: str, given: Any) -> Tensor:
    """`given` itself, or the tensor of an array or of nested lists.

    Raises:
        TypeError: it is none of these; the message says `name`.
    """
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{type(given).__name__}, of which torch says: {error}".rstrip(".")
        raise InputTypeError(f"{name} must be a tensor, an array or lists of numbers, got {what}.") from error


@dataclass(frozen=True)
class ScoredBatch:
    """What a metric may look at; the fields are the arguments of `SampleMetric.score`."""

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

    def __post_init__(self) -> None:
        for name in ("maps", "targets", "indices", "labels", "masks", "predictions"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_tensor(name, getattr(self, name)))
        if self.boxes is not None and not isinstance(self.boxes, Tensor):
            object.__setattr__(self, "boxes", [_corners(one) for one in self.boxes])
        if self.maps.dtype == torch.bool:
            object.__setattr__(self, "maps", self.maps.to(self.images.dtype))
        expected = (len(self.images), *self.images.shape[-2:])
        if self.maps.shape != expected:
            raise InputError(f"maps must be {expected} to fit the images, got {tuple(self.maps.shape)}; resize them.")
        for name in ("targets", "indices", "labels", "predictions"):
            given = getattr(self, name)
            if given is not None and given.shape != expected[:1]:
                raise InputError(f"{name} must have one entry per image {expected[:1]}, got {tuple(given.shape)}.")
        if self.masks is not None and self.masks.shape != expected:
            raise InputError(f"masks must be {expected} to fit the images, got {tuple(self.masks.shape)}.")
        if self.boxes is not None and len(self.boxes) != len(self.images):
            raise InputError(f"boxes must have one entry per image {expected[:1]}, got {len(self.boxes)}.")
        for name in ("targets", "labels"):
            given = getattr(self, name)
            if given is not None and (given.is_floating_point() or given.is_complex()):
                raise InputError(f"{name} must be class indices, got {given.dtype}.")
            object.__setattr__(self, name, None if given is None else given.long())
        object.__setattr__(self, "maps", self.maps.detach())
        bad = self.indices.to(self.maps.device)[~self.maps.isfinite().flatten(1).all(1)].tolist()
        if bad:
            raise InputError(f"maps must be finite; the map of sample {bad[0]} holds NaN or infinity.")

    @property
    def true_labels(self) -> Tensor:
        """(B,) the labels on the images' device; the targets where no labels are given."""
        return (self.targets if self.labels is None else self.labels).to(self.images.device)

    def predicted(self, engine: PerturbationEngine) -> Tensor:
        """(B,) the predicted classes on the images' device; the engine's, in its precision, where none are given."""
        return engine.original().argmax(-1) if self.predictions is None else self.predictions.to(self.images.device)

    def engine(self, **options: Any) -> PerturbationEngine:
        """`cache`, which must hold these images, or a new engine with `options`."""
        if self.cache is None:
            return PerturbationEngine.for_model(self.model, self.images, indices=self.indices, **options)
        if self.cache.images.shape != self.images.shape or not torch.equal(self.cache.images, self.images):
            raise InputError("cache must be the perturbation engine of these images; it holds others.")
        return self.cache


@dataclass(frozen=True)
class SampleScores:
    """Scores of one batch, as `SampleMetric.score_batch` gives them.

    Attributes:
        values: name of a value -> (B,) floating; NaN where the metric leaves the sample out.
        curves: name of a line, such as `x` or `insertion` -> (S, K), for metrics that are areas under curves.
        samples: (S,) int64, positions in the batch of the samples that have curves.

    Example:
        >>> SampleScores({"sparseness": torch.tensor([0.5, 0.25])}).values["sparseness"]
        tensor([0.5000, 0.2500])
    """

    values: dict[str, Tensor]
    curves: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None


def _corners(boxes: Any) -> Tensor:
    """The boxes of one sample as a tensor, (0, 4) where it has none."""
    tensor = as_tensor("boxes", boxes)
    return tensor.new_zeros(0, 4) if tensor.shape == (0,) else tensor


def need_explainer(batch: ScoredBatch, metric: str, why: str) -> None:
    """Raise ValueError unless the batch says what made its maps."""
    if batch.explainer is None:
        raise InputError(f"metric {metric!r} {why}: it needs explainer=, as made the maps.")


class SampleRows(Metric):
    """State of one row (index, values) per sample, merged to the same digits on any number of ranks.

    Args:
        names: of the values.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        # Flat rows in one state: a rank without samples then contributes an empty tensor of the same kind.
        self.add_state("rows", [], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows, also of those that an empty rank contributes; a move to a device does not change it."""
        return torch.float64

    def append(self, indices: Tensor, scores: dict[str, Tensor]) -> None:
        """Keep the values of a batch: one (B,) tensor per name."""
        columns = [indices, *(scores[name] for name in self.names)]
        table = torch.stack([column.to(self.device, torch.float64) for column in columns], dim=1)
        self.rows.append(table.flatten())
        # What `update` does around this, for callers that score and append themselves.
        self._computed, self._update_count = None, self._update_count + 1

    def per_sample(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Sorted sample indices (n,) int64 and, per name, their values (n,) float64; each sample once."""
        rows = dim_zero_cat(self.rows) if len(self.rows) else torch.empty(0, dtype=torch.float64, device=self.device)
        indices, *columns = rows.view(-1, 1 + len(self.names)).cpu().numpy().T
        merged = SampleTable(np.unique(indices.astype(np.int64)), len(self.names))
        merged.add(indices.astype(np.int64), dict(enumerate(columns)))
        found = torch.from_numpy(merged.index).to(self.device), torch.from_numpy(merged.values).to(self.device)
        return found[0], dict(zip(self.names, found[1]))


class SampleMetric(SampleRows):
    """A metric with one value per sample and name; `compute` gives their means.

    Subclasses set `names` and implement `score_batch`. A value of NaN says that the metric leaves the sample out.

    Attributes:
        counts_samples: `compute` gives numbers of samples in place of means, which results keep in a table of its own.
        needs_regions: it compares with ground truth, masks or boxes.
    """

    counts_samples = False
    needs_regions = False

    @property
    def revision(self) -> int:
        """Raised when these arguments come to give other values than before: results on disk are not taken for them."""
        return 0

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError where images of this (height, width) cannot be scored."""

    def check(self, batch: ScoredBatch) -> None:
        """Raise ValueError where the batch lacks what the metric needs, before anything is computed."""
        self.check_size((batch.images.shape[-2], batch.images.shape[-1]))

    @abstractmethod
    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Values, one (B,) tensor per entry of `names`, NaN where a sample is left out, and curves if there are any."""

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
    ) -> dict[str, Tensor]:
        """Values of a batch, without touching the state.

        Args:
            model: returns logits or an object with `.logits`.
            images: (B, C, H, W), normalised.
            maps: (B, H, W), at the images' size.
            targets: (B,) int64, the class that was explained.
            indices: (B,) int64, positions in the data set.
            labels: (B,) int64, the true class; None: the targets are the labels.
            masks: (B, H, W) bool ground-truth regions, where the data has them.
            boxes: per sample (n, 4) ground-truth boxes x1, y1, x2, y2 in pixels, where the data has them.
            explainer: what made the maps, for metrics that explain again.
            cache: the batch's perturbation engine, through which metrics share their forwards.
            predictions: (B,) int64, the classes that the model predicts, where they are known already, in full
                precision for example; None: they are computed where needed.

        Returns:
            One (B,) float64 tensor per entry of `names`; NaN: the sample is left out.

        Raises:
            ValueError: a map is not finite (named by its index) or does not have the images' size, or what the metric
                needs (masks, an explainer) is not given.
        """
        more = (labels, masks, boxes, explainer, cache, predictions)
        batch = ScoredBatch(model, images, maps, targets, indices, *more)
        self.check(batch)
        return self.score_batch(batch).values

    def update(
        self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, indices: Tensor, **more: Any
    ) -> None:
        """Score a batch and keep its rows; arguments as in `score`."""
        self.append(indices, self.score(model, images, maps, targets, indices, **more))

    def reduce(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """From per-sample values (n,) per name to what `compute` gives: means over those that are not left out."""
        return {name: column[~column.isnan()].mean() for name, column in values.items()}

    def compute(self) -> dict[str, Tensor]:
        """Mean per name over the samples that are not left out, float64; NaN where there is none."""
        return self.reduce(self.per_sample()[1])
