"""Insertion, deletion and their difference on patches: the metrics ID and PID."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, checked_option, scatter_to_batch
from labn.metrics.functional.insertion_deletion import (
    AREAS,
    PROTOCOLS,
    InsertionDeletionCurves,
    chosen_tolerance,
    insertion_deletion_curves,
    patch_counts,
)
from labn.metrics.scores import SampleScores
from labn.perturbation.fills import FILLS, Channels
from labn.perturbation.patches import POOLINGS, TIES, patch_grid, patch_pool, patch_ranks

VALUES = ("insertion", "deletion", "pid", "fill_probability", "error")


class PatchInsertionDeletion(FilledMetric):
    """Patch insertion-deletion (JSAI 2022, eq. 7-9; ACCV 2022): PID = AUC(insertion) - AUC(deletion); m = 1 is ID.

    Patches are ordered by the maximum of the map in each patch; A_n are the first n patches. Insertion shows
    i_n = p on A_n, b elsewhere; deletion shows d_n = b on A_n, p elsewhere, with the image p and the fill b. A curve is
    the probability of a class over the fraction of moved patches, and its area is the trapezoid rule's.

    PID lies in [-1, 1]. Under `protocol="paper"` the expected PID of an uninformative map is 0, exactly where the step
    divides the number of patches (a shorter last step weighs the end of insertion less than the beginning of deletion).
    Under `"official"` the expectation lies above 0, and figures of different m do not compare.

    `compute()` returns the means of `insertion`, `deletion`, `pid`, `fill_probability`, and `error` of adaptive curves.
    `score` returns values under their names in files: `pid16`, `insertion16@official`, ... and `id` for m = 1. `curves`
    returns the whole curves.

    Args:
        patch_size: m in pixels; patches at the right and lower edge are smaller where m does not divide the size.
        step: s, patches per step; None: the released code's table where it has the size, else about N / 100.
        protocol: "paper", or "official" for the released code: one patch too many at every point, no point at n = 0,
            the last point repeated, equally spaced x. It needs square images whose side m divides.
        ties: "fraction" moves tied patches together, and x is the moved fraction; "stable" takes raster order; "random"
            a seeded order; "threshold" moves them together but advances x by the nominal step, which is this artefact
            of the released code alone: a constant map then scores (1 - s / N) (p(c | x) - p(c | b)).
        fill: colour of removed pixels, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        score_class: "label" (the true class), "target" (the explained one) or "predicted".
        pooling: importance of a patch, the "max", "mean" or "sum" of its pixels.
        n_steps: number of steps in place of `step`: step = ceil(N / n_steps).
        steps: "all", or "auto" for as few of these steps as the tolerance allows; the value `pid16@error` is then the
            bound of the error of `pid16`, see `labn.metrics.functional.adaptive.adaptive_curves`.
        tolerance: error of PID at which "auto" ends; None: 0.002.
        deletion_fill: fill of deletion (RISE: `fill="blur"`, `deletion_fill="mean"`); None: `fill`.
        probability: "softmax", "sigmoid" or "logit".
        area: "trapezoid", or "mean" of the points: see `labn.metrics.functional.mean_height`.
        seed: seed of the "uniform" fill and of "random" ties.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: an argument outside its range, `step` and `n_steps` together, `ties` with `protocol="official"`, or
            `steps="auto"` with `area="mean"`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.zeros(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> images[..., 2:, 2:] = 1.0
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> metric = PatchInsertionDeletion(patch_size=2, step=1, probability="logit")
        >>> metric.score(model, images, maps, target, index)["pid2"]
        tensor([0.7500], dtype=torch.float64)
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
        steps: str = "all",
        tolerance: float | None = None,
        deletion_fill: str | None = None,
        probability: str = "softmax",
        area: str = "trapezoid",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        # Names are those of the registry, so that a value in a file can be asked for by its name again.
        suffix = f"@{protocol}" if protocol != "paper" else f"@{ties}" if ties != "fraction" else ""
        stems = (f"insertion{patch_size}", f"deletion{patch_size}", "id" if patch_size == 1 else f"pid{patch_size}")
        bounds = [f"{stems[2]}{suffix}@error"] if steps == "auto" else []
        names = [*(stem + suffix for stem in stems), "fill_probability", *bounds]
        super().__init__(
            names, fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed, chunk_size,
            fold, precision, **kwargs,
        )  # fmt: skip
        numbers = [number for number in (step, n_steps, patch_size) if number is not None]
        if len(numbers) == 3 or min(numbers) < 1:
            raise InputError(f"give step or n_steps, not both, and above 0: {step=}, {n_steps=}, {patch_size=}.")
        if protocol == "official" and ties != "fraction":
            raise InputError(f"protocol='official' lets ties enter together: leave ties at 'fraction', got {ties!r}.")
        self.patch_size, self.step, self.n_steps = patch_size, step, n_steps
        self.protocol = checked_option("protocol", protocol, PROTOCOLS)
        self.ties = checked_option("ties", ties, TIES)
        self.pooling = checked_option("pooling", pooling, POOLINGS)
        self.area = checked_option("area", area, AREAS)
        self.deletion_fill = checked_option("deletion_fill", deletion_fill or fill, FILLS)
        self.tolerance = chosen_tolerance(steps, tolerance, self.area)

    def counts(self, size: tuple[int, int]) -> Tensor:
        """Numbers of moved patches (K,) int64 for images of this (height, width); see `patch_counts`."""
        rows, columns = patch_grid(size, self.patch_size)
        # Rounded up: n_steps is an upper bound, and the last step may be short.
        step = -(-rows * columns // self.n_steps) if self.n_steps else self.step
        return patch_counts(size, self.patch_size, step, self.protocol)

    @property
    def revision(self) -> int:
        """1 for `area="mean"` with `ties="fraction"`, whose values changed when ties stopped moving the points."""
        return int(self.area == "mean" and self.ties == "fraction")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where images of this (height, width) are smaller than a patch or do not fit the protocol."""
        self.counts(size)

    def curves(self, *args: Any, **kwargs: Any) -> InsertionDeletionCurves:
        """Insertion and deletion curves of the S scored samples; arguments as in `score`."""
        return self._curves(ScoredBatch(*args, **kwargs))

    def _curves(self, batch: ScoredBatch) -> InsertionDeletionCurves:
        images = batch.images
        counts, scored = self.counts((images.shape[-2], images.shape[-1])), self.included(batch)
        if len(scored) == 0:
            empty = images.new_zeros(0, len(counts), dtype=torch.float64)
            error = None if self.tolerance is None else empty[:, 0]
            return InsertionDeletionCurves(scored, counts, empty, empty, empty, empty[:, 0], empty, error)
        # Both curves and the bare fill go through one engine, which computes their common end points once.
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
            tolerance=self.tolerance,
        )

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch: areas by their names in files, and the curves."""
        curves = self._curves(batch)
        areas = curves.areas(self.area)
        values = {
            name: scatter_to_batch(areas[value], curves.samples, batch) for name, value in zip(self.names, VALUES)
        }
        lines = {"x": curves.x, "insertion": curves.insertion, "deletion": curves.deletion}
        return SampleScores(values, lines, curves.samples)

    def steps(self, maps: Tensor, indices: Tensor) -> Tensor:
        """First point k of the curve at which each patch has moved.

        Args:
            maps: (B, H, W), at the images' size.
            indices: (B,) int64 positions in the data set, for random ties.

        Returns:
            (B, rows, columns) int64; K for a patch that never moves.
        """
        size = (maps.shape[-2], maps.shape[-1])
        counts = self.counts(size).to(maps.device)
        ranks = self._ranks(maps, indices.to(maps.device))
        # A patch of rank r has moved at the first point whose count exceeds r.
        return torch.searchsorted(counts, ranks, right=True).unflatten(1, patch_grid(size, self.patch_size))

    def compute(self) -> dict[str, Tensor]:
        """Means of `insertion`, `deletion`, `pid`, `fill_probability` and `error` over the scored samples, float64."""
        return dict(zip(VALUES, super().compute().values()))

    def _ranks(self, maps: Tensor, indices: Tensor) -> Tensor:
        values = patch_pool(maps, self.patch_size, self.pooling)
        return patch_ranks(values, self.ties, seed=self.seed, indices=indices)
