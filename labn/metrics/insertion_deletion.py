"""Insertion, deletion and their difference on patches: ID and PID."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from labn.fills import FILLS, Channels, FillOptions, fill_with
from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.functional.insertion_deletion import PROTOCOLS, InsertionDeletionCurves
from labn.patches import POOLINGS, TIES, default_step, patch_grid, patch_pool, patch_ranks, ranks_to_pixels
from labn.perturb import PerturbationEngine

PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "logit": lambda logits: logits,
}
AREAS = ("insertion", "deletion", "pid", "fill_probability")


SCORE_CLASSES: dict[str, Callable[[ScoredBatch, PerturbationEngine], Tensor]] = {
    "label": lambda batch, engine: batch.true_labels,
    "target": lambda batch, engine: batch.targets.to(batch.images.device),
    "predicted": lambda batch, engine: engine.original().argmax(-1),
}


def _key_of(argument: str, value: str, options: Mapping[str, object]) -> str:
    """`value`; ValueError names the argument and what it may be where there is no such option."""
    if value not in options:
        raise ValueError(f"{argument} must be one of {sorted(options)}, got {value!r}.")
    return value


class PatchInsertionDeletion(SampleMetric):
    """Patch insertion-deletion (JSAI 2022, eq. 7-9; ACCV 2022): PID = AUC(insertion) - AUC(deletion); m = 1 is ID.

    Patches are ordered by the map's maximum inside. Insertion shows the image's first n patches on the fill b, deletion
    the image without them: i_n = p on A_n, b elsewhere; d_n = b on A_n, p elsewhere. The curves are the probability of
    a class over the fraction of patches moved; the area is the trapezoid's. PID lies in [-1, 1]; an uninformative map
    expects 0 under `protocol="paper"`, and more than 0 under `"official"`, whose figures do not compare across m.

    `compute()` gives the means of `insertion`, `deletion`, `pid` and `fill_probability` (of the bare fill: on a
    two-class model it can be anything). `score` names its values for files: `pid16`, `insertion16@official`, ... and
    `id` for m = 1. `curves` gives the whole curves.

    Args:
        patch_size: m in pixels; patches at the right and lower edge are smaller where m does not divide the size.
        step: patches per step; None: the released table where it has the size, else about N / 100.
        protocol: "paper", or "official" to reproduce the released code: thresholds, one patch too many, no point at
            n = 0, the last point repeated, equally spaced x whatever was moved. It needs square images that m divides.
        ties: "fraction": tied patches enter together and x is the fraction really moved; "stable": raster order;
            "random": seeded order.
        fill: what removed pixels show, a name in `labn.fills.FILLS`.
        mean: per-channel mean that the images were normalised with; None: not at all.
        std: likewise the standard deviation.
        positives_only: leave out samples with label 0.
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        score_class: "label" (the true class), "target" (the explained one) or "predicted".
        pooling: "max", "mean" or "sum" over a patch.
        n_steps: number of steps instead of `step`: step = ceil(N / n_steps).
        deletion_fill: another fill for deletion (RISE: `fill="blur"`, `deletion_fill="mean"`); None: the same.
        probability: "softmax", "sigmoid" or "logit".
        seed: of the "uniform" fill and of "random" ties.
        chunk_size: inputs per forward; see `labn.perturb.PerturbationEngine`. This and the next two shape the engine
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
        positives_only: bool = False,
        bias: Tensor | None = None,
        score_class: str = "label",
        pooling: str = "max",
        n_steps: int | None = None,
        deletion_fill: str | None = None,
        probability: str = "softmax",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        suffix = f"@{protocol}" if protocol != "paper" else f"@{ties}" if ties != "fraction" else ""
        stems = (f"insertion{patch_size}", f"deletion{patch_size}", "id" if patch_size == 1 else f"pid{patch_size}")
        super().__init__([*(stem + suffix for stem in stems), "fill_probability"], **kwargs)
        if (step is not None and n_steps is not None) or min(step or 1, n_steps or 1, patch_size) < 1:
            raise ValueError(f"give step or n_steps, not both, and above 0: {step=}, {n_steps=}, {patch_size=}.")
        if protocol == "official" and ties != "fraction":
            raise ValueError(f"protocol='official' lets ties enter together: leave ties at 'fraction', got {ties!r}.")
        self.patch_size, self.step, self.n_steps = patch_size, step, n_steps
        self.protocol = _key_of("protocol", protocol, PROTOCOLS)
        self.ties = _key_of("ties", ties, TIES)
        self.pooling = _key_of("pooling", pooling, POOLINGS)
        self.fills = [_key_of("fill", name, FILLS) for name in (fill, deletion_fill or fill)]
        self.fill_options = FillOptions(mean, std, bias, seed=seed)
        self.score_class = _key_of("score_class", score_class, SCORE_CLASSES)
        self.probability = _key_of("probability", probability, PROBABILITIES)
        self.positives_only, self.seed = positives_only, seed
        self.engine_options = {"chunk_size": chunk_size, "fold": fold, "precision": precision}

    def counts(self, size: tuple[int, int]) -> Tensor:
        """(K,) int64 numbers of patches moved, for images of this (height, width)."""
        rows, columns = patch_grid(size, self.patch_size)
        if self.protocol == "official" and (size[0] != size[1] or size[0] % self.patch_size):
            raise ValueError(f"protocol='official' needs square images divisible by {self.patch_size}, got {size}.")
        step = self.step or default_step(size, self.patch_size)
        step = -(-rows * columns // self.n_steps) if self.n_steps else step
        return PROTOCOLS[self.protocol].counts(rows * columns, step)

    def included(self, labels: Tensor) -> Tensor:
        """(S,) int64 positions of the batch's samples that are scored."""
        keep = labels > 0 if self.positives_only else torch.ones_like(labels, dtype=torch.bool)
        return keep.nonzero().squeeze(1)

    def curves(self, *args: Any, **kwargs: Any) -> InsertionDeletionCurves:
        """Curves of the S = len(included(labels)) scored samples; arguments as in `score`.

        After `score` with the same `cache` they cost no forward.
        """
        return self._curves(ScoredBatch(*args, **kwargs))

    def _curves(self, batch: ScoredBatch) -> InsertionDeletionCurves:
        images, size = batch.images, (batch.images.shape[-2], batch.images.shape[-1])
        counts, kept = self.counts(size), self.included(batch.true_labels)
        if len(kept) == 0:
            nothing = images.new_zeros(0, len(counts), dtype=torch.float64)
            return InsertionDeletionCurves(counts, nothing, nothing, nothing, nothing[:, 0])
        engine = batch.engine(**self.engine_options)
        classes = SCORE_CLASSES[self.score_class](batch, engine)[kept]
        ranks = self._ranks(batch.maps.to(images.device)[kept], batch.indices.to(images.device)[kept])
        pixel_ranks = ranks_to_pixels(ranks, self.patch_size, size)
        options = replace(self.fill_options, indices=batch.indices)
        fill, deletion_fill = (fill_with(name, images, options) for name in self.fills)
        x = PROTOCOLS[self.protocol].x(ranks, counts)
        insertion = self._of_class(engine.masked(pixel_ranks, counts, fill, "first", kept), classes)
        deletion = self._of_class(engine.masked(pixel_ranks, counts, deletion_fill, "rest", kept), classes)
        bare = self._of_class(engine.filled(fill)[kept, None], classes)[:, 0]
        return InsertionDeletionCurves(counts, x, insertion, deletion, bare)

    def score_batch(self, batch: ScoredBatch) -> dict[str, Tensor]:
        """Areas of a batch by their names in files."""
        return self.values(self._curves(batch), batch.true_labels)

    def values(self, curves: InsertionDeletionCurves, labels: Tensor) -> dict[str, Tensor]:
        """The dict of `score` from curves that are already there; `labels` (B,) as given to `curves`."""
        table = curves.x.new_full((len(labels), len(AREAS)), torch.nan)
        areas = curves.areas()
        table[self.included(labels.to(table.device))] = torch.stack([areas[name] for name in AREAS], 1)
        return dict(zip(self.names, table.unbind(1)))

    def compute(self) -> dict[str, Tensor]:
        """Means `insertion`, `deletion`, `pid` and `fill_probability` over the samples that are scored, float64."""
        return dict(zip(AREAS, super().compute().values()))

    def _ranks(self, maps: Tensor, indices: Tensor) -> Tensor:
        values = patch_pool(maps, self.patch_size, self.pooling)
        return patch_ranks(values, self.ties, seed=self.seed, indices=indices)

    def _of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Probability (S, K) of each sample's class from logits (S, K, num_classes)."""
        chosen = classes.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
        return PROBABILITIES[self.probability](logits).gather(2, chosen).squeeze(2)
