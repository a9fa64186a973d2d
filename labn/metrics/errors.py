"""Error analysis: kinds of failure among the maps with the lowest insertion-deletion scores (C3-LRP, JSAI 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.functional.errors import KINDS, ErrorThresholds, count_errors, region_shares
from labn.metrics.functional.localisation import relevance_mass
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.localisation import check_regions, regions_of
from labn.metrics.scores import SampleScores
from labn.perturbation.fills import Channels
from labn.postprocess.regions import Options, threshold

AreaThreshold = Literal["mean", "otsu", "quantile", "absolute"]


class ErrorAnalysis(SampleMetric):
    """Number of failures of each kind among the `n_failures` samples with the lowest ID (C3-LRP, JSAI 2024).

    - `insufficient`: the map's area covers less than `low_coverage` of the box;
    - `over`: more than `high_outside` of the area lies outside of the box, and more than `high_coverage` of the box is
      covered;
    - `wrong`: less than `low_mass` of the positive relevance lies in the box, whatever the area;
    - `other`: none of these.

    A failure has one kind, see `labn.metrics.functional.kinds_of_error`. The map's area is the set of pixels above a
    threshold (the mean of the map, as in C3). The values per sample are `errors_id`, `errors_coverage`,
    `errors_outside` and `errors_mass`; `compute()` returns the counts over the data set. Masks take precedence over
    boxes where both are given.

    Args:
        n_failures: number of samples that count as failures; 100 in the paper.
        low_coverage: share of the box in [0, 1], see above.
        high_outside: share of the area in [0, 1].
        high_coverage: share of the box in [0, 1].
        low_mass: share of the relevance in [0, 1].
        area_threshold: `mean`, `otsu`, `quantile` or `absolute`, see `labn.postprocess.Options`.
        area_level: the quantile, or the absolute level.
        step: pixels per step of ID; this and all further arguments are those of `PatchInsertionDeletion`.
        n_steps: number of steps in place of `step`.
        steps: "all", or "auto" for as few steps as the tolerance allows.
        tolerance: error of ID at which "auto" ends.
        fill: colour of removed pixels.
        mean: per-channel mean of the images' normalisation.
        std: per-channel standard deviation of the normalisation.
        bias: image for `fill="bias"`.
        positives_only: leave out samples with label 0.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: the scored class, "label", "target" or "predicted".
        seed: seed of the "uniform" fill.
        chunk_size: inputs per forward.
        fold: whether forwards may run on a BatchNorm-folded copy.
        precision: "fp32" or "bf16".

    Raises:
        InputError: a threshold outside [0, 1], `n_failures` below 1, or a batch with neither masks nor boxes.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.ones(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> metric, boxes = ErrorAnalysis(), [torch.tensor([[0.0, 0.0, 4.0, 2.0]])]
        >>> metric.update(model, images, maps, torch.tensor([0]), torch.tensor([0]), boxes=boxes)
        >>> {name: int(count) for name, count in metric.compute().items()}
        {'failures': 1, 'insufficient': 0, 'over': 0, 'wrong': 1, 'other': 0}
    """

    counts_samples = True
    needs_regions = True

    def __init__(
        self,
        n_failures: int = 100,
        low_coverage: float = 0.25,
        high_outside: float = 0.5,
        high_coverage: float = 0.75,
        low_mass: float = 0.25,
        area_threshold: AreaThreshold = "mean",
        area_level: float = 0.5,
        step: int | None = None,
        n_steps: int | None = None,
        steps: str = "all",
        tolerance: float | None = None,
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "label",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(["errors_id", "errors_coverage", "errors_outside", "errors_mass"], **kwargs)
        if n_failures < 1:
            raise InputError(f"n_failures is {n_failures}; it must be at least 1.")
        self.n_failures = n_failures
        self.thresholds = ErrorThresholds(low_coverage, high_outside, high_coverage, low_mass)
        self.area = Options(threshold=area_threshold, level=area_level)
        # Failures are the samples with the lowest pixel-wise ID (m = 1), whatever other metrics are computed.
        self.insertion_deletion = PatchInsertionDeletion(
            1,
            step=step,
            n_steps=n_steps,
            steps=steps,
            tolerance=tolerance,
            fill=fill,
            mean=mean,
            std=std,
            bias=bias,
            positives_only=positives_only,
            correct_only=correct_only,
            score_class=score_class,
            seed=seed,
            chunk_size=chunk_size,
            fold=fold,
            precision=precision,
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where ID cannot score images of this (height, width)."""
        self.insertion_deletion.check_size(size)

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without masks or boxes."""
        super().check(batch)
        check_regions(batch, "errors")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """ID, coverage, share outside and relevance mass per sample; a shared `cache` supplies the forwards of ID."""
        regions = regions_of(batch).to(batch.maps.device)
        # Strictly above: a constant map equals its mean everywhere and has no area.
        areas = torch.stack([heat > threshold(heat, self.area) for heat in batch.maps])
        coverage, outside = region_shares(areas, regions)
        scores = self.insertion_deletion.score_batch(batch).values["id"]
        columns = (scores, coverage, outside, relevance_mass(batch.maps, regions))
        return SampleScores(dict(zip(self.names, columns)))

    def reduce(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts `failures` and one per kind, float64: see `labn.metrics.functional.count_errors`."""
        scores, coverage, outside, mass = (values[name].cpu() for name in self.names)
        # Counts need all samples at once: the worst n of the data set are not the worst n of each batch.
        counts = count_errors(scores, coverage, outside, mass, self.n_failures, self.thresholds)
        return {name: torch.tensor(float(counts[name]), dtype=torch.float64) for name in ("failures", *KINDS)}
