"""Completeness, sensitivity-n, mu-fidelity and infidelity: sums of the map against what the output loses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, scatter_to_batch
from labn.metrics.functional.faithfulness import completeness_gap, scaled_infidelity, subset_correlation
from labn.metrics.scores import SampleScores
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.fills import Channels
from labn.perturbation.patches import patch_grid, patch_pool, ranks_to_pixels
from labn.perturbation.stateless_random import sample_integers

SET_STREAM = 2  # of the random numbers; random ties and the "uniform" fill have others


class Completeness(FilledMetric):
    """Relative gap between the map's sum and f(x) - f(fill): see `labn.metrics.functional.completeness_gap`.

    Methods such as integrated gradients promise a gap of 0 for their own baseline; for maps without a unit, such as
    class activation maps, the value says nothing. The cost is a forward per image and one of the fill.

    Args:
        fill: the baseline, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class), "label" or "predicted".
        probability: output f: "logit", "softmax" or "sigmoid".
        seed: seed of the "uniform" fill.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> images, target, index = torch.ones(1, 1, 2, 2), torch.tensor([0]), torch.tensor([0])
        >>> Completeness().score(model, images, torch.full((1, 2, 2), 0.5), target, index)
        {'completeness': tensor([0.5000], dtype=torch.float64)}
    """

    higher_is_better = False

    def __init__(
        self,
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        probability: str = "logit",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ["completeness"], fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed,
            chunk_size, fold, precision, **kwargs,
        )  # fmt: skip

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch."""
        scored = self.included(batch)
        gaps = batch.images.new_empty(0)
        if len(scored):
            engine = batch.engine(**self.engine_options)
            logits = torch.stack([engine.original(scored), engine.filled(self.filling(batch))[scored]], 1).double()
            whole, bare = self.of_class(logits, self.classes(batch, engine)[scored]).unbind(1)
            gaps = completeness_gap(batch.maps.to(batch.images.device)[scored], whole - bare)
        return SampleScores({"completeness": scatter_to_batch(gaps, scored, batch)})


class RemovedSets(FilledMetric):
    """Base of the metrics that remove random sets of patches from the image.

    Every draw is a random order of the patches, whose first n are removed for every size n. The orders depend on
    (seed, sample index) alone, so that all maps of an image, and all metrics of this base with the same settings, share
    their forwards: draws * sizes + 1 per image.

    Args:
        draws: number of random orders.
        sizes: sizes of the sets, as shares of the patches in (0, 1).
        patch_size: side of a patch in pixels.
        fill: colour of removed pixels, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class), "label" or "predicted".
        probability: output f: "logit", "softmax" or "sigmoid".
        seed: seed of the orders and of the "uniform" fill.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: fewer than 2 draws, or a size that is not between 0 and 1.
    """

    name: ClassVar[str]

    def __init__(
        self,
        draws: int = 32,
        sizes: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        patch_size: int = 8,
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        probability: str = "logit",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            [self.name], fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed,
            chunk_size, fold, precision, **kwargs,
        )  # fmt: skip
        if draws < 2 or not sizes or not all(0 < size < 1 for size in sizes):
            raise InputError(f"draws must be at least 2 and sizes between 0 and 1, got {draws} and {list(sizes)}.")
        self.draws, self.sizes, self.patch_size = draws, tuple(sizes), patch_size

    @abstractmethod
    def compare(self, sums: Tensor, drops: Tensor) -> Tensor:
        """Score (S,) from the map's sums and the drops of the output, both (S, K sizes, D draws) float64."""

    def patch_side(self, size: tuple[int, int]) -> int:
        """Side of a patch in pixels, of images of this (height, width)."""
        return self.patch_size

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where images of this (height, width) are smaller than a patch."""
        patch_grid(size, self.patch_side(size))

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch."""
        scored = self.included(batch)
        values = batch.images.new_empty(0)
        if len(scored):
            values = self.compare(*self._sums_and_drops(batch, scored))
        return SampleScores({self.name: scatter_to_batch(values, scored, batch)})

    def _sums_and_drops(self, batch: ScoredBatch, scored: Tensor) -> tuple[Tensor, Tensor]:
        engine = batch.engine(**self.engine_options)
        size = (batch.images.shape[-2], batch.images.shape[-1])
        side = self.patch_side(size)
        rows, columns = patch_grid(size, side)
        counts = torch.tensor([max(1, round(share * rows * columns)) for share in self.sizes])
        ranks = self._ranks(batch.indices[scored.cpu()], rows * columns).to(batch.images.device)
        sums = patch_pool(batch.maps.to(batch.images.device)[scored].double(), side, "sum").flatten(1)
        # (S, D, N) < (K, 1, 1, 1): which patches are removed, for every size.
        removed = ranks < counts.to(ranks).view(-1, 1, 1, 1)
        return (removed * sums[:, None]).sum(-1).permute(1, 0, 2), self._drops(batch, engine, scored, ranks, counts)

    def _ranks(self, indices: Tensor, patches: int) -> Tensor:
        """Random orders (S, D, N) of the patches."""
        numbers = sample_integers(self.seed, indices, self.draws * patches, SET_STREAM)
        return numbers.view(len(indices), self.draws, patches).argsort(-1).argsort(-1)

    def _drops(
        self, batch: ScoredBatch, engine: PerturbationEngine, scored: Tensor, ranks: Tensor, counts: Tensor
    ) -> Tensor:
        """f(x) - f(x without the first n patches) (S, K, D)."""
        size = (batch.images.shape[-2], batch.images.shape[-1])
        pixels = ranks_to_pixels(ranks.flatten(0, 1), self.patch_side(size), size)
        repeated = scored.repeat_interleave(self.draws)
        logits = engine.masked(pixels, counts, self.filling(batch), "rest", repeated).double()
        classes = self.classes(batch, engine)[scored]
        without = self.of_class(logits, classes.repeat_interleave(self.draws)).unflatten(0, (len(scored), self.draws))
        whole = self.of_class(engine.original(scored)[:, None].double(), classes)
        return whole[..., None] - without.transpose(1, 2)


class SensitivityN(RemovedSets):
    """Sensitivity-n: correlation of the map's sums over random sets with what the output loses without them.

    See `labn.metrics.functional.subset_correlation`; the arguments are those of `RemovedSets`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> images, target, index = torch.ones(1, 1, 4, 4), torch.tensor([0]), torch.tensor([0])
        >>> maps = model[1].weight[0].view(1, 4, 4)
        >>> scores = SensitivityN(draws=8, patch_size=1).score(model, images, maps, target, index)
        >>> round(scores["sensitivity_n"].item(), 4)
        1.0
    """

    name = "sensitivity_n"

    def compare(self, sums: Tensor, drops: Tensor) -> Tensor:
        """`subset_correlation`."""
        return subset_correlation(sums, drops)


class Infidelity(RemovedSets):
    """Infidelity with the optimal scale: mean squared gap between scaled sums of the map and the output's drops.

    See `labn.metrics.functional.scaled_infidelity`; the arguments are those of `RemovedSets`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> images, target, index = torch.ones(1, 1, 4, 4), torch.tensor([0]), torch.tensor([0])
        >>> Infidelity(sizes=[0.5], patch_size=1).score(model, images, torch.zeros(1, 4, 4), target, index)
        {'infidelity': tensor([64.], dtype=torch.float64)}
    """

    name = "infidelity"
    higher_is_better = False

    def compare(self, sums: Tensor, drops: Tensor) -> Tensor:
        """`scaled_infidelity`."""
        return scaled_infidelity(sums, drops)


class MuFidelity(RemovedSets):
    """Correlation of the map's sums over random sets of cells of one size with what the output loses without them.

    mu-fidelity (Bhatt et al., IJCAI 2020, definition 3) on a coarse grid: `sensitivity_n` at one size, over cells whose
    number does not grow with the image. The cost is draws + 1 forwards per image, for all maps together.

    Args:
        draws: number of random sets.
        share: share of the cells in a set, in (0, 1).
        grid: cells along the shorter side of the image.
        fill: colour of removed pixels, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class), "label" or "predicted".
        probability: output f: "logit", "softmax" or "sigmoid".
        seed: seed of the sets and of the "uniform" fill.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: fewer than 2 draws, a share that is not between 0 and 1, or a grid below 2; on `score`, images with
            fewer pixels than cells along the shorter side.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> images, target, index = torch.ones(1, 1, 4, 4), torch.tensor([0]), torch.tensor([0])
        >>> maps = model[1].weight[0].view(1, 4, 4)
        >>> MuFidelity(draws=8, grid=4).score(model, images, maps, target, index)["mufidelity"].round(decimals=4)
        tensor([1.], dtype=torch.float64)
    """

    name = "mufidelity"

    def __init__(
        self,
        draws: int = 128,
        share: float = 0.2,
        grid: int = 9,
        fill: str = "black",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        probability: str = "logit",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            draws, (share,), 1, fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed,
            chunk_size, fold, precision, **kwargs,
        )  # fmt: skip
        if grid < 2:
            raise InputError(f"grid must be at least 2, got {grid}.")
        self.grid = grid

    def patch_side(self, size: tuple[int, int]) -> int:
        """The smallest side of which `grid` patches cover the shorter side of the image."""
        return -(-min(size) // self.grid)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise InputError where images of this (height, width) have fewer pixels than cells."""
        if self.grid > min(size):
            raise InputError(f"grid must be at most {min(size)} for images of {size[0]}x{size[1]}, got {self.grid}.")

    def compare(self, sums: Tensor, drops: Tensor) -> Tensor:
        """`subset_correlation`."""
        return subset_correlation(sums, drops)
