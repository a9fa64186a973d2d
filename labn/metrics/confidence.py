"""Average drop, percent increase and ADCC: the class's probability when the image is multiplied by its map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from labn.metrics.base import ScoredBatch, check_explainer
from labn.metrics.filled import FilledMetric, checked_option, scatter_to_batch
from labn.metrics.functional.confidence import adcc, confidence_drop, confidence_increase
from labn.metrics.functional.similarity import correlation
from labn.metrics.scores import SampleScores
from labn.perturbation.fills import Channels
from labn.postprocess import unit_range

# The space in which the image is multiplied by the map, and the fill that a zero of the map then shows.
MASK_SPACES = {"normalised": "mean", "pixel": "black"}


class ConfidenceChange(FilledMetric):
    """Base of the metrics that compare the softmax probabilities Y on the image x and O on E * x (Chattopadhay et al.).

    E is the map scaled to [0, 1] by its own minimum and maximum; a constant map becomes 0 and hides the whole image. A
    map that is high nearly everywhere hides little, so that large maps are rewarded: read the values beside those of
    `constant` and `random` and beside `sparseness`. The cost is two forwards per image, of which the one of the
    unperturbed image is shared with other metrics.

    Args:
        mask_space: "normalised" multiplies the normalised image, and zeros of E show the mean colour; "pixel"
            multiplies the pixels in [0, 1], and zeros of E show black.
        mean: per-channel mean of the images' normalisation, for "pixel"; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        positives_only: leave out samples with label 0, which then cost no forward.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "target" (the explained class, which is the papers' predicted class where predictions are
            explained), "label" or "predicted".
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".
    """

    names_of_values: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        mask_space: str = "normalised",
        mean: Channels | None = None,
        std: Channels | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "target",
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        fill = MASK_SPACES[checked_option("mask_space", mask_space, MASK_SPACES)]
        super().__init__(
            self.names_of_values,
            fill,
            mean,
            std,
            positives_only=positives_only,
            correct_only=correct_only,
            score_class=score_class,
            chunk_size=chunk_size,
            fold=fold,
            precision=precision,
            **kwargs,
        )

    def confidences(self, batch: ScoredBatch, scored: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities Y and O of the scored samples.

        Args:
            batch: the batch.
            scored: (S,) int64, positions of the scored samples in the batch.
            weights: (S, H, W), E.

        Returns:
            Y and O, each (S,) float64.
        """
        engine = batch.engine(**self.engine_options)
        # float64 before the softmax: a drop is a small difference of two probabilities near 1.
        logits = torch.stack([engine.original(scored), engine.soft(weights, self.filling(batch), scored)], 1).double()
        whole, shown = self.of_class(logits, self.classes(batch, engine)[scored]).unbind(1)
        return whole, shown

    @abstractmethod
    def values(self, batch: ScoredBatch, scored: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Values of the scored samples, one (S,) float64 tensor per name; arguments as for `confidences`."""

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch: name -> (B,) values."""
        scored = self.included(batch)
        columns: tuple[Tensor, ...] = (batch.images.new_empty(0),) * len(self.names)
        if len(scored):
            # Scaled to [0, 1] before the cast to the images' dtype: small relevances underflow to 0 in half precision.
            wide = torch.promote_types(batch.maps.dtype, batch.images.dtype)
            maps = unit_range(batch.maps.to(batch.images.device, wide)[scored])
            columns = self.values(batch, scored, maps.to(batch.images))
        return SampleScores(
            {name: scatter_to_batch(column, scored, batch) for name, column in zip(self.names, columns)}
        )


class AverageDrop(ConfidenceChange):
    """Average Drop in percent, 100 max(0, Y - O) / Y per sample: see `labn.metrics.functional.confidence_drop`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.ones(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> AverageDrop().score(model, images, maps, target, index)
        {'average_drop': tensor([10.3071], dtype=torch.float64)}
    """

    higher_is_better = False
    names_of_values = ("average_drop",)

    def values(self, batch: ScoredBatch, scored: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Drops in percent, one (S,) tensor."""
        return (confidence_drop(*self.confidences(batch, scored, weights)),)


class PercentIncrease(ConfidenceChange):
    """Percent Increase in Confidence, 100 where O > Y per sample: see `labn.metrics.functional.confidence_increase`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.ones(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> PercentIncrease().score(model, images, maps, target, index)
        {'percent_increase': tensor([0.], dtype=torch.float64)}
    """

    names_of_values = ("percent_increase",)

    def values(self, batch: ScoredBatch, scored: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """0 or 100, one (S,) tensor."""
        return (confidence_increase(*self.confidences(batch, scored, weights)),)


class ADCC(ConfidenceChange):
    """Average Drop, Coherency, Complexity (Poppi et al., CVPR Workshops 2021, section 3), per sample and in [0, 1].

    F is the explanation of the masked image E * x, scaled to [0, 1] as E is. `adcc_coherency` is (1 + r) / 2 with
    Pearson's correlation r of E and F, `adcc_complexity` the mean of E, and `adcc` the harmonic mean of coherency,
    1 - complexity and 1 - drop, with `AverageDrop` / 100 as the drop.

    A map that does not depend on the image, such as `random`, is perfectly coherent. The cost per sample is one
    explanation and two forwards.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.ones(1, 1, 4, 4), torch.arange(16.0).view(1, 4, 4)
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> explainer = explainer_by_name("random")
        >>> ADCC().score(model, images, maps, target, index, explainer=explainer)["adcc_complexity"]
        tensor([0.5000], dtype=torch.float64)
    """

    names_of_values = ("adcc", "adcc_coherency", "adcc_complexity")

    def check(self, batch: ScoredBatch) -> None:
        """An explainer is needed."""
        super().check(batch)
        check_explainer(batch, "adcc", "explains the images seen through their maps")

    def values(self, batch: ScoredBatch, scored: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """ADCC, coherency and complexity, each (S,) float64; explains the masked images once."""
        # fill + E (x - fill): for a fill of zeros this is the paper's E * x.
        masked = torch.lerp(self.filling(batch), batch.images[scored], weights.unsqueeze(1))
        maps = batch.explain_again(masked, batch.targets[scored.to(batch.targets.device)], rows=scored)
        # The paper asks for a correlation in [0, 1]; r lies in [-1, 1], and the released code maps it like this.
        coherency = (1 + correlation(weights, unit_range(maps.to(weights)))) / 2
        complexity = weights.double().mean((1, 2))
        drop = confidence_drop(*self.confidences(batch, scored, weights)) / 100
        return adcc(coherency, complexity, drop), coherency, complexity
