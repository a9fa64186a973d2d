"""IROF: iterative removal of superpixels in the order of the map."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labn.errors import InputError
from labn.metrics.base import ScoredBatch
from labn.metrics.filled import FilledMetric, scatter_to_batch
from labn.metrics.functional.superpixels import area_over_curve, segment_means, segment_ranks
from labn.metrics.scores import SampleScores
from labn.perturbation.fills import Channels, to_pixels
from labn.perturbation.superpixels import slic


class IROF(FilledMetric):
    """Area over the curve of the class's probability, relative to the whole image's, without more and more superpixels.

    Iterative removal of features (Rieger and Hansen, ICLR workshop 2020): the superpixels (`slic`) are removed one
    after the other, that of the highest mean of the map first; those of equal means leave together. The value is at
    most 1, and 0 where no removal changes anything. Superpixels depend on the image alone. The cost is one forward per
    superpixel and map.

    Args:
        n_segments: number of superpixels, about.
        compactness: weight of the position against the colour in `slic`.
        fill: colour of removed superpixels, a name in `labn.perturbation.fills.FILLS`.
        mean: per-channel mean of the images' normalisation; None: images in [0, 1].
        std: per-channel standard deviation of the normalisation; None: images in [0, 1].
        bias: (C, H, W) image in pixel space [0, 1], for `fill="bias"`.
        positives_only: True leaves out samples with label 0; a list of classes scores only these.
        correct_only: leave out samples whose label is not the predicted class.
        score_class: "label" (the true class), "target" (the explained one) or "predicted".
        probability: "softmax" or "sigmoid".
        seed: seed of the "uniform" fill.
        chunk_size: inputs per forward, see `PerturbationEngine`. This and the next two arguments are for the engine
            that is made where no `cache` is given.
        fold: whether forwards may run on a BatchNorm-folded copy of the model.
        precision: "fp32" or "bf16".

    Raises:
        InputError: an argument outside of its range.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> images, maps = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4)
        >>> images[..., 2:, 2:] = maps[..., 2:, 2:] = 1.0
        >>> target, index = torch.tensor([0]), torch.tensor([0])
        >>> IROF(n_segments=4).score(model, images, maps, target, index)["irof"].round(decimals=2)
        tensor([0.2800], dtype=torch.float64)
    """

    def __init__(
        self,
        n_segments: int = 64,
        compactness: float = 10.0,
        fill: str = "mean",
        mean: Channels | None = None,
        std: Channels | None = None,
        bias: Tensor | None = None,
        positives_only: bool | Sequence[int] = False,
        correct_only: bool = False,
        score_class: str = "label",
        probability: str = "softmax",
        seed: int = 0,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        **kwargs: Any,
    ) -> None:
        if probability == "logit":
            raise InputError(
                "irof divides by the probability on the whole image: probability must be softmax or sigmoid."
            )
        super().__init__(
            ["irof"], fill, mean, std, bias, positives_only, correct_only, score_class, probability, seed, chunk_size,
            fold, precision, **kwargs,
        )  # fmt: skip
        if n_segments < 1 or not compactness > 0:
            raise InputError(
                f"n_segments must be at least 1 and compactness above 0, got {n_segments} and {compactness}."
            )
        self.n_segments, self.compactness = n_segments, compactness

    def score_batch(self, batch: ScoredBatch) -> SampleScores:
        """Score a batch."""
        scored = self.included(batch)
        values = batch.images.new_empty(0)
        if len(scored):
            x, probabilities = self._curve(batch, scored)
            values = area_over_curve(x, probabilities)
        return SampleScores({"irof": scatter_to_batch(values, scored, batch)})

    def _curve(self, batch: ScoredBatch, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the removed superpixels and probability of the class (S, 1 + L), from none to all."""
        device, engine = batch.images.device, batch.engine(**self.engine_options)
        segments = self.segments(batch.images[scored]).to(device)
        means = segment_means(batch.maps.to(device)[scored], segments)
        ranks = segment_ranks(means)
        counts = torch.arange(means.shape[1] + 1, device=device)
        moved = (ranks[:, None] < counts[:, None]).sum(2)  # (S, 1 + L)
        pixels = ranks.gather(1, segments.flatten(1)).view_as(segments)
        logits = engine.masked(pixels, counts, self.filling(batch), "rest", scored).double()
        probabilities = self.of_class(logits, self.classes(batch, engine)[scored])
        return moved / means.isfinite().sum(1, keepdim=True), probabilities

    def segments(self, images: Tensor) -> Tensor:
        """Superpixels (S, H, W) of normalised images (S, C, H, W), on the CPU."""
        pixels = to_pixels(images, self.fill_options)
        return torch.stack([_segments(image, self.n_segments, self.compactness) for image in pixels]).long()


_MOST_KEPT = 128

_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
"""Superpixels of the images that were segmented last, which all maps of an image share."""


def _segments(pixels: Tensor, n_segments: int, compactness: float) -> Tensor:
    """Superpixels (H, W) int32 of an image (C, H, W) in pixel space, on the CPU."""
    content = np.ascontiguousarray(pixels.detach().cpu().float().numpy())
    key = (hashlib.sha256(content.tobytes()).digest(), content.shape, n_segments, compactness)
    if key not in _kept:
        _kept[key] = slic(torch.from_numpy(content)[None], n_segments, compactness)[0].int()
    _kept.move_to_end(key)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return _kept[key]
