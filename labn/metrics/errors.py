"""Error analysis: what is wrong with the maps of the lowest insertion-deletion score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, SampleScores, ScoredBatch
from labn.metrics.functional.errors import KINDS, ErrorThresholds, count_errors, region_shares
from labn.metrics.functional.localisation import relevance_mass
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.metrics.localisation import need_regions, regions_of
from labn.perturbation.fills import Channels
from labn.postprocess.regions import Options, threshold

AreaThreshold = Literal["mean", "otsu", "quantile", "absolute"]


class ErrorAnalysis(SampleMetric):
    """Failures and their kinds (C3-LRP, JSAI 2024): of the `n_failures` samples with the lowest ID it counts

    - `insufficient`: the map's area covers less than `low_coverage` of the box;
    - `over`: more than `high_outside` of the area lies outside of the box, and more than `high_coverage` of the box is
      covered;
    - `wrong`: less than `low_mass` of the positive relevance lies in the box, whatever the area;
    - `other`: none of these.

    A failure has one kind, see `labn.metrics.functional.kinds_of_error`. The map's area is where it exceeds a threshold
    (its mean, as C3 takes it). Per sample it gives `errors_id`, `errors_coverage`, `errors_outside` and `errors_mass`;
    `compute()` gives the counts, which are of the data set and no means. Masks win over boxes where both are given.

    Args:
        n_failures: samples that count as failures, those of the lowest ID; 100 in the paper.
        low_coverage: see above, as for the next three; shares in [0, 1].
        high_outside: share of the area.
        high_coverage: share of the box.
        low_mass: share of the relevance.
        area_threshold: `mean`, `otsu`, `quantile` or `absolute`, see `labn.postprocess.Options`.
        area_level: the quantile, or the absolute level.
        step: of ID, see `PatchInsertionDeletion`, as for all further arguments.
        n_steps: number of steps instead.
        fill: what removed pixels show.
        mean: per-channel mean that the images were normalised with.
        std: likewise the standard deviation.
        bias: image for `fill="bias"`.
        positives_only: leave out samples with label 0.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: class whose probability is read.
        seed: of the "uniform" fill.
        chunk_size: inputs per forward.
        fold: whether the BatchNorm-folded copy may be used.
        precision: "fp32" or "bf16".

    Raises:
        ValueError: a threshold that is no share, no failure asked for, or neither masks nor boxes given.
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
        self.insertion_deletion = PatchInsertionDeletion(
            1,
            step=step,
            n_steps=n_steps,
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
        """As ID."""
        self.insertion_deletion.check_size(size)

    def check(self, batch: ScoredBatch) -> None:
        """Ground truth is needed."""
        super().check(batch)
        need_regions(batch, "errors")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """ID, coverage, share outside and relevance mass per sample; with a shared `cache` ID costs no forward."""
        regions = regions_of(batch).to(batch.maps.device)
        areas = torch.stack([one > threshold(one, self.area) for one in batch.maps])
        coverage, outside = region_shares(areas, regions)
        scores = self.insertion_deletion.score_batch(batch).values["id"]
        columns = (scores, coverage, outside, relevance_mass(batch.maps, regions))
        return SampleScores(dict(zip(self.names, columns)))

    def reduce(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """`failures` and the number of each kind, see `labn.metrics.functional.count_errors`."""
        scores, coverage, outside, mass = (values[name].cpu() for name in self.names)
        counts = count_errors(scores, coverage, outside, mass, self.n_failures, self.thresholds)
        return {name: torch.tensor(float(counts[name]), dtype=torch.float64) for name in ("failures", *KINDS)}
