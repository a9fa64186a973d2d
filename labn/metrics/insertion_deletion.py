"""Insertion, deletion and their difference on patches: ID and PID."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleScores, ScoredBatch
from labn.metrics.filled import FilledMetric, key_of, spread
from labn.metrics.functional.insertion_deletion import (
    AREAS,
    PROTOCOLS,
    InsertionDeletionCurves,
    insertion_deletion_curves,
    patch_counts,
)
from labn.perturbation.fills import FILLS, Channels
from labn.perturbation.patches import POOLINGS, TIES, patch_grid, patch_pool, patch_ranks

VALUES = ("insertion", "deletion", "pid", "fill_probability")


class PatchInsertionDeletion(FilledMetric):
    """Patch insertion-deletion (JSAI 2022, eq. 7-9; ACCV 2022): PID = AUC(insertion) - AUC(deletion); m = 1 is ID.

    Patches are ordered by the map's maximum inside. Insertion shows the image's first n patches on the fill b, deletion
    the image without them: i_n = p on A_n, b elsewhere; d_n = b on A_n, p elsewhere. The curves are the probability of
    a class over the fraction of patches moved; the area is the trapezoid's. PID lies in [-1, 1]; an uninformative map
    expects 0 under `protocol="paper"` (exactly where the step divides the number of patches; a shorter last step weighs
    insertion's end less than deletion's beginning), and more than 0 under `"official"`, whose figures do not compare
    across m.

    `compute()` gives the means of `insertion`, `deletion`, `pid` and `fill_probability` (of the bare fill: on a
    two-class model it can be anything). `score` names its values for files: `pid16`, `insertion16@official`, ... and
    `id` for m = 1. `curves` gives the whole curves.

    Args:
        patch_size: m in pixels; patches at the right and lower edge are smaller where m does not divide the size.
        step: patches per step; None: the released table where it has the size, else about N / 100.
        protocol: "paper", or "official" to reproduce the released code: thresholds, one patch too many, no point at
            n = 0, the last point repeated, equally spaced x whatever was moved. It needs square images that m divides.
        ties: "fraction": tied patches enter together and x is the fraction really moved; "stable": raster order;
            "random": seeded order; "threshold": together like "fraction", but x goes on by the nominal step, the
            artefact of the released code alone: a constant map scores (1 - s / N) (p(c | x) - p(c | b)).
        fill: what removed pixels show, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean that the images were normalised with; None: not at all.
        std: likewise the standard deviation.
        positives_only: leave out samples with label 0; a list of classes scores those.
        correct_only: leave out samples whose label is not the predicted class.
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        score_class: "label" (the true class), "target" (the explained one) or "predicted".
        pooling: "max", "mean" or "sum" over a patch.
        n_steps: number of steps instead of `step`: step = ceil(N / n_steps).
        deletion_fill: another fill for deletion (RISE: `fill="blur"`, `deletion_fill="mean"`); None: the same.
        probability: "softmax", "sigmoid" or "logit".
        area: of a curve, "trapezoid" or "mean" of its points, which ties do not move: see
            `labn.metrics.functional.mean_height`.
        seed: of the "uniform" fill and of "random" ties.
        chunk_size: inputs per forward; see `PerturbationEngine`. This and the next two shape the engine
            that is made where `cache` is not given.
        fold: whether the BatchNorm-folded copy of the model may be used.
        precision: "fp32" or "bf16".

    Raises:
        ValueError: an argument outside its range, `step` and `n_steps` together, or `ties` with `protocol="official"`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        step: int | None = None,
        protocol: str = "paper",
        ties: str = "fraction",
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        bias: Tensor | None = None,
        score_class: str = "label",
        pooling: str = "max",
        n_steps: int | None = None,
        deletion_fill: str | None = None,
        probability: str = "softmax",
        area: str = "trapezoid",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        suffix = f"@{protocol}" if protocol != "paper" else f"@{ties}" if ties != "fraction" else ""
        stems = (f"insertion{patch_size}", f"deletion{patch_size}", "id" if patch_size == 1 else f"pid{patch_size}")
        names = [*(stem + suffix for stem in stems), "fill_probability"]
        super().__init__(
            names, fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed, chunk_size,
            fold, precision, **kwargs,
        )  # fmt: skip
        given = [number for number in (step, n_steps, patch_size) if number is not None]
        if len(given) == 3 or min(given) < 1:
            raise InputError(f"give step or n_steps, not both, and above 0: {step=}, {n_steps=}, {patch_size=}.")
        if protocol == "official" and ties != "fraction":
            raise InputError(f"protocol='official' lets ties enter together: leave ties at 'fraction', got {ties!r}.")
        self.patch_size, self.step, self.n_steps = patch_size, step, n_steps
        self.protocol = key_of("protocol", protocol, PROTOCOLS)
        self.ties = key_of("ties", ties, TIES)
        self.pooling = key_of("pooling", pooling, POOLINGS)
        self.area = key_of("area", area, AREAS)
        self.deletion_fill = key_of("deletion_fill", deletion_fill or fill, FILLS)

    def counts(self, size: tuple[int, int]) -> Tensor:
        """(K,) int64 numbers of patches moved, for images of this (height, width); see `patch_counts`."""
        rows, columns = patch_grid(size, self.patch_size)
        step = -(-rows * columns // self.n_steps) if self.n_steps else self.step
        return patch_counts(size, self.patch_size, step, self.protocol)

    @property
    def revision(self) -> int:
        """1 where means of curves are taken at places that ties do not move, as they were not before."""
        return int(self.area == "mean" and self.ties == "fraction")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError where images of this (height, width) have no such patches, or do not fit the protocol."""
        self.counts(size)

    def curves(self, *args: Any, **kwargs: Any) -> InsertionDeletionCurves:
        """Curves of the S scored samples; arguments as in `score`."""
        return self._curves(ScoredBatch(*args, **kwargs))

    def _curves(self, batch: ScoredBatch) -> InsertionDeletionCurves:
        images = batch.images
        counts, scored = self.counts((images.shape[-2], images.shape[-1])), self.included(batch)
        if len(scored) == 0:
            nothing = images.new_zeros(0, len(counts), dtype=torch.float64)
            return InsertionDeletionCurves(scored, counts, nothing, nothing, nothing, nothing[:, 0], nothing)
        engine = batch.engine(**self.engine_options)
        return insertion_deletion_curves(
            engine,
            self._ranks(batch.maps.to(images.device)[scored], batch.indices.to(images.device)[scored]),
            counts,
            self.classes(batch, engine)[scored],
            self.filling(batch),
            self.filling(batch, self.deletion_fill),
            patch_size=self.patch_size,
            samples=scored,
            protocol=self.protocol,
            ties=self.ties,
            probability=self.probability,
        )

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Areas of a batch by their names in files, and the curves that they are the areas of."""
        curves = self._curves(batch)
        areas = curves.areas(self.area)
        values = {name: spread(areas[value], curves.samples, batch) for name, value in zip(self.names, VALUES)}
        lines = {"x": curves.x, "insertion": curves.insertion, "deletion": curves.deletion}
        return SampleScores(values, lines, curves.samples)

    def steps(self, maps: Tensor, indices: Tensor) -> Tensor:
        """First point k of the curve at which each patch has moved: (B, rows, columns) int64; K where it never does.

        Args:
            maps: (B, H, W), at the images' size.
            indices: (B,) int64 positions in the data set, for random ties.
        """
        size = (maps.shape[-2], maps.shape[-1])
        counts = self.counts(size).to(maps.device)
        ranks = self._ranks(maps, indices.to(maps.device))
        return torch.searchsorted(counts, ranks, right=True).unflatten(1, patch_grid(size, self.patch_size))

    def compute(self) -> dict[str, Tensor]:
        """Means `insertion`, `deletion`, `pid` and `fill_probability` over the samples that are scored, float64."""
        return dict(zip(VALUES, super().compute().values()))

    def _ranks(self, maps: Tensor, indices: Tensor) -> Tensor:
        values = patch_pool(maps, self.patch_size, self.pooling)
        return patch_ranks(values, self.ties, seed=self.seed, indices=indices)
