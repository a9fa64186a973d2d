"""Model-parameter randomisation tests: a map against the map of the model with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.gradient import gaussian_noise, noise_scale
from labn.inference.hooks import recording_calls
from labn.inference.randomised_copy import count_layers, randomised_copies
from labn.metrics.base import SampleMetric, ScoredBatch, check_explainer
from labn.metrics.functional.complexity import histogram_entropy, relative_rise
from labn.metrics.functional.insertion_deletion import trapezoid_area
from labn.metrics.functional.similarity import rank_correlation
from labn.metrics.scores import SampleScores


class Randomisation(SampleMetric):
    """Similarity of the map to the map of a model with random weights, by the same explainer (Adebayo et al. 2018).

    The similarity is Spearman's rank correlation of the pixels, in [-1, 1]. At 1 the explanation does not depend on
    the weights; the explainers `random` and `constant` have exactly 1. Copies of the model are randomised and the model
    itself does not change. The cost is one explanation per sample and stage.

    Args:
        n_stages: 1 randomises all layers at once. A larger number randomises the layers cumulatively from the output to
            the input in that many groups, and the value is the mean over the groups (the paper's cascade).
        absolute: whether absolute values are compared, for methods whose sign carries no meaning.
        seed: seed of the random weights.

    Raises:
        InputError: `n_stages` below 1, or a model whose copy would run modules of the model itself.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("random"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> Randomisation().score(model, images, maps, target, index, explainer=explainer)
        {'randomisation': tensor([1.], dtype=torch.float64)}
    """

    higher_is_better = False

    def __init__(self, n_stages: int = 1, absolute: bool = False, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["randomisation"], **kwargs)
        if n_stages < 1:
            raise InputError(f"n_stages must be at least 1, got {n_stages}.")
        self.n_stages, self.absolute, self.seed = n_stages, absolute, seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "randomisation", "explains a randomised copy of the model")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with one explanation per stage."""
        copies = randomised_copies(batch.model, self.seed, self.n_stages)
        return SampleScores({"randomisation": torch.stack([self.similarity(batch, copy) for copy in copies]).mean(0)})

    def similarity(self, batch: ScoredBatch, network: nn.Module) -> Tensor:
        """Rank correlation (B,) of the batch's maps with those of a randomised copy."""
        maps = explain_copy(batch, network, batch.images, "randomisation")
        # Ranks and not values: explainers differ in scale, and Adebayo et al. report Spearman's correlation.
        return rank_correlation(compared(batch.maps.to(maps), self.absolute), compared(maps, self.absolute))


def compared(maps: Tensor, absolute: bool) -> Tensor:
    """The maps, or their absolute values."""
    return maps.abs() if absolute else maps


def explain_copy(batch: ScoredBatch, network: nn.Module, images: Tensor, metric: str) -> Tensor:
    """Maps (B, H, W) of a copy of the batch's model by the batch's explainer.

    Raises:
        InputError: the copy runs modules of the model itself.
    """
    # A deep copy does not reach modules that a closure holds; their calls show up on the original model.
    with recording_calls(batch.model) as original_calls:
        maps = batch.explain_again(images, batch.targets, network)
    if original_calls:
        raise InputError(
            f"{metric}: a copy of {type(batch.model).__name__} runs the model's own "
            f"{type(original_calls[0]).__name__}, because an attribute of it is a function that holds it; "
            "make that function a method."
        )
    return maps


class LayerRandomisation(SampleMetric):
    """Area under the curve of the map's similarity to the maps of a model that loses its weights from the top down.

    The layers are randomised cumulatively from the output to the input (cascading randomisation, Adebayo et al. 2018,
    section 4.1). The curve starts at 1 with no layer and has a point per group of layers, Spearman's rank correlation
    with the map of the trained model; x is the share of the groups. An explanation that depends on all weights falls
    early. The cost is one explanation per group; `curve` returns the whole curve.

    Args:
        n_stages: number of groups of layers; every layer is its own group where the model has fewer, or with None. As
            many copies of the model are held in memory.
        absolute: whether absolute values are compared, for methods whose sign carries no meaning.
        seed: seed of the random weights.

    Raises:
        InputError: `n_stages` below 1, or a model whose copy would run modules of the model itself.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("random"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> LayerRandomisation().score(model, images, maps, target, index, explainer=explainer)
        {'mprt_layers': tensor([1.], dtype=torch.float64)}
    """

    higher_is_better = False

    def __init__(self, n_stages: int | None = 8, absolute: bool = False, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["mprt_layers"], **kwargs)
        if n_stages is not None and n_stages < 1:
            raise InputError(f"n_stages must be at least 1, got {n_stages}.")
        self.n_stages, self.absolute, self.seed = n_stages, absolute, seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "mprt_layers", "explains randomised copies of the model")

    def curve(self, *args: Any, **kwargs: Any) -> Tensor:
        """Similarities (B, 1 + groups) with no, one, two, ... groups randomised; arguments as in `score`."""
        return self._curve(ScoredBatch(*args, **kwargs))

    def _curve(self, batch: ScoredBatch) -> Tensor:
        layers = max(count_layers(batch.model), 1)
        points = [torch.ones(len(batch.images), dtype=torch.float64, device=batch.images.device)]
        for network in randomised_copies(batch.model, self.seed, min(self.n_stages or layers, layers)):
            maps = explain_copy(batch, network, batch.images, "mprt_layers")
            pair = (compared(values, self.absolute) for values in (batch.maps.to(maps), maps))
            points.append(rank_correlation(*pair))
        return torch.stack(points, 1)

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with one explanation per group of layers."""
        curve = self._curve(batch)
        x = torch.linspace(0, 1, curve.shape[1], dtype=torch.float64, device=curve.device).expand_as(curve)
        return SampleScores({"mprt_layers": trapezoid_area(curve, x)})


class SmoothRandomisation(SampleMetric):
    """Similarity of the maps of the model and of one with random weights, both averaged over noisy copies of the image.

    Smooth MPRT (Hedstroem et al. 2023, section 4.1): noise in gradients makes maps of any two models unlike; the mean
    over noise, as in SmoothGrad, takes it away before Spearman's rank correlation compares the maps. The cost is two
    explanations per draw.

    Args:
        draws: number of noisy copies of every image.
        noise_level: standard deviation of the noise, as a share of each image's max - min.
        absolute: whether absolute values are averaged and compared.
        seed: seed of the random weights, and of the noise, which depends on (seed, sample index).

    Raises:
        InputError: no draw, negative `noise_level`, or a model whose copy would run modules of the model itself.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("random"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> SmoothRandomisation().score(model, images, maps, target, index, explainer=explainer)
        {'smprt': tensor([1.], dtype=torch.float64)}
    """

    higher_is_better = False

    def __init__(
        self, draws: int = 10, noise_level: float = 0.1, absolute: bool = False, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(["smprt"], **kwargs)
        if draws < 1 or not noise_level >= 0:
            raise InputError(f"draws must be at least 1 and noise_level not negative, got {draws} and {noise_level}.")
        self.draws, self.noise_level, self.absolute, self.seed = draws, noise_level, absolute, seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "smprt", "explains noisy copies of the images by two models")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with two explanations per draw."""
        (copy,) = randomised_copies(batch.model, self.seed)
        scale = noise_scale(batch.images, self.noise_level, relative=True)
        means = torch.zeros(2, *batch.maps.shape, dtype=torch.float64, device=batch.images.device)
        for draw in range(self.draws):
            noise = gaussian_noise(batch.images, batch.indices, self.seed, range(draw, draw + 1))[0]
            for mean, network in zip(means, (batch.model, copy)):
                mean += compared(self._explained(batch, network, batch.images + scale * noise), self.absolute).double()
        return SampleScores({"smprt": rank_correlation(*means)})

    def _explained(self, batch: ScoredBatch, network: nn.Module, images: Tensor) -> Tensor:
        if network is batch.model:
            return batch.explain_again(images, batch.targets)
        return explain_copy(batch, network, images, "smprt")


class EfficientRandomisation(SampleMetric):
    """Relative rise of the entropy of the map's histogram once all weights of the model are random.

    Efficient MPRT (Hedstroem et al. 2023, section 4.2): the map of a model that knows nothing should be more complex
    than that of the trained one; nothing is compared pixel by pixel. See `labn.metrics.functional.histogram_entropy`
    and `relative_rise`. The cost is one explanation.

    Args:
        bins: number of bins of the histogram, which spans each map's values.
        absolute: whether absolute values enter the histogram.
        seed: seed of the random weights.

    Raises:
        InputError: fewer than 2 bins, or a model whose copy would run modules of the model itself.

    Example:
        >>> from torch import nn
        >>> from labn.explainers import explainer_by_name
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.ones(1, 1, 4, 4)
        >>> explainer, target, index = explainer_by_name("random"), torch.tensor([0]), torch.tensor([0])
        >>> maps = explainer(model, images, target, index)
        >>> EfficientRandomisation().score(model, images, maps, target, index, explainer=explainer)
        {'emprt': tensor([0.], dtype=torch.float64)}
    """

    def __init__(self, bins: int = 100, absolute: bool = False, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(["emprt"], **kwargs)
        if bins < 2:
            raise InputError(f"bins must be at least 2, got {bins}.")
        self.bins, self.absolute, self.seed = bins, absolute, seed

    def check(self, batch: ScoredBatch) -> None:
        """Raise InputError without an explainer."""
        super().check(batch)
        check_explainer(batch, "emprt", "explains a randomised copy of the model")

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch with one explanation."""
        (copy,) = randomised_copies(batch.model, self.seed)
        pair = (batch.maps, explain_copy(batch, copy, batch.images, "emprt").to(batch.maps.device))
        before, after = (histogram_entropy(compared(maps, self.absolute), self.bins) for maps in pair)
        return SampleScores({"emprt": relative_rise(before, after)})
