"""Metrics that explain again: sensitivity of a map to small changes of the image, and to the class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import SampleMetric, ScoredBatch, check_explainer
from labn.metrics.functional.similarity import rank_correlation
from labn.metrics.functional.stability import relative_changes
from labn.metrics.scores import SampleScores
from labn.perturbation.stateless_random import sample_integers, sample_uniform

NOISE_STREAM, CLASS_STREAM = 3, 4  # of the random numbers; ties, fills and sets of patches have others


class Sensitivity(SampleMetric):
    """Largest and mean relative change |map(x + d) - map(x)| / |map(x)| for small d (Yeh et al., NeurIPS 2019).

    Values `max_sensitivity` and `avg_sensitivity`, over uniform noise d with |d| <= radius in every pixel; the norm is
    Frobenius'. A map that does not depend on the image has 0. The cost is one explanation per draw.

    Args:
        draws: number of noisy copies of every image.
        radius: largest change of a pixel, in the images' normalised units.
        seed: seed of the noise, which depends on (seed, sample index).

    Raises:
        InputError: no draw, or a radius that is not above 0.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("gradient"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> Sensitivity().score(model, images, maps, target, index, explainer=explainer)["max_sensitivity"]
        tensor([0.], dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, draws: int = 10, radius: float = 0.2, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["max_sensitivity", "avg_sensitivity"], **kwargs)
        if draws < 1 or not radius > 0:
            raise InputError(f"draws must be at least 1 and radius above 0, got {draws} and {radius}.")
        self.draws, self.radius, self.seed = draws, radius, seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "max_sensitivity", "explains noisy copies of the images")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with one explanation per draw."""
        count = batch.images[0].numel()
        numbers = sample_uniform(self.seed, batch.indices.cpu(), self.draws * count, torch.float64, NOISE_STREAM)
        changes = []
        for noise in numbers.view(len(batch.images), self.draws, *batch.images.shape[1:]).unbind(1):
            moved = batch.images + (self.radius * (2 * noise - 1)).to(batch.images)
            maps = batch.explain_again(moved, batch.targets)
            changes.append(relative_changes(batch.maps.to(maps), maps))
        stacked = torch.stack(changes)
        return SampleScores({"max_sensitivity": stacked.amax(0), "avg_sensitivity": stacked.mean(0)})


class RandomLogit(SampleMetric):
    """Rank correlation of the map with the map of another class, drawn per sample (Sixt et al., ICML 2020).

    At 1 the map does not depend on the class. The cost is one explanation and the forward of the image, whose logits
    say how many classes there are.

    Args:
        seed: seed of the drawn class, which depends on (seed, sample index).

    Raises:
        InputError: on `score`, a model of one class.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("random"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> RandomLogit().score(model, images, maps, target, index, explainer=explainer)
        {'random_logit': tensor([1.], dtype=torch.float64)}
    """

    higher_is_better = False

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["random_logit"], **kwargs)
        self.seed = seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "random_logit", "explains another class")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with one explanation."""
        classes = batch.engine().original().shape[1]
        if classes < 2:
            raise InputError("random_logit explains another class; the model has one.")
        others = self.other_classes(batch.targets.cpu(), batch.indices.cpu(), classes)
        maps = batch.explain_again(batch.images, others.to(batch.targets.device))
        return SampleScores({"random_logit": rank_correlation(batch.maps.to(maps), maps)})

    def other_classes(self, targets: Tensor, indices: Tensor, classes: int) -> Tensor:
        """Classes (B,) int64 other than the targets, each equally probable."""
        steps = sample_integers(self.seed, indices, 1, CLASS_STREAM)[:, 0] % (classes - 1)
        return (targets + 1 + steps) % classes
