"""Score-CAM: weights from the scores of the image seen through each feature map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import check_targets
from labn.explainers.cam.features import layer_features
from labn.explainers.cam.gradcam import ActivationMap
from labn.perturbation.engine import PerturbationEngine, check_precision
from labn.postprocess import unit_range


def _softmax_of_gain(scores: Tensor, baseline: Tensor) -> Tensor:
    return (scores - baseline).softmax(dim=0)


def _gain(scores: Tensor, baseline: Tensor) -> Tensor:
    return scores - baseline


def _score(scores: Tensor, baseline: Tensor) -> Tensor:
    return scores


# What a weight is made of: (K,) scores of the masked images and the score of the baseline -> (K,) weights.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": _softmax_of_gain,
    "gain": _gain,
    "score": _score,
}

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"logit": lambda x: x, "probability": lambda x: x.softmax(dim=-1)}


class ScoreCAM(ActivationMap):
    """Score-CAM (Wang et al., CVPR-W 2020, eq. 5-8): w = softmax_k( y_c(x * up(norm01(A^k))) - y_c(baseline) ).

    One forward per feature map; the baseline is the image of zeros, the mean colour after normalisation.

    Args:
        target_layer: name of the layer; None finds the last one with spatial feature maps.
        relu: keep the ReLU of the map.
        score: "logit" (the equations) or "probability".
        weighting: "softmax" over the channels of the gain above the baseline (the equations), "gain" without the
            softmax, or "score" without both; the authors' released code is score="probability", weighting="score".
        chunk_size: masked images per forward; None lets the engine choose. The map does not depend on it.
        fold: whether the forwards may run on a copy with BatchNorm folded, which gives the same logits up to rounding.
        channels: how many feature maps take part per image, those with the largest spatial standard deviation; the
            others get the weight 0. None takes all. A map that hardly varies hardly masks.
        precision: of these forwards, "fp32" (the images' own dtype) or "bf16" (autocast).

    Raises:
        ValueError: an unknown score, weighting or precision, or no channels.
    """

    def __init__(
        self,
        target_layer: str | None = None,
        relu: bool = True,
        score: str = "logit",
        weighting: str = "softmax",
        chunk_size: int | None = None,
        fold: bool = True,
        channels: int | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(target_layer, relu)
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
        if weighting not in WEIGHTINGS:
            raise InputError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
        if channels is not None and channels < 1:
            raise InputError(f"channels must be at least 1, got {channels}.")
        check_precision(precision)
        self.score, self.weighting, self.channels = score, weighting, channels
        self.chunk_size, self.fold, self.precision = chunk_size, fold, precision

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) from A and the scores (B, K + 1), whose last column is the baseline's."""
        weights = torch.zeros_like(gradients[:, :-1])
        for row, scores, taken in zip(weights, gradients, self._taken(activations)):
            row[taken] = WEIGHTINGS[self.weighting](scores[:-1][taken], scores[-1])
        return weights[:, :, None, None]

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, h, w) weighted sum at the layer's resolution."""
        features = layer_features(model, self.layer(model, images), images)
        check_targets(targets, features.logits.shape[1])
        engine = PerturbationEngine.for_model(
            model, images, chunk_size=self.chunk_size, fold=self.fold, precision=self.precision
        )
        baselines = SCORES[self.score](engine.filled(0.0)).gather(1, targets[:, None])
        scores = torch.cat([torch.zeros_like(features.activations[:, :, 0, 0]), baselines], dim=1)
        for row, image, maps, taken, target in zip(
            scores, images, features.activations, self._taken(features.activations), targets
        ):
            row[:-1][taken] = self._scores(engine, image, unit_range(maps[taken]), target)
        return self.weigh(self.weights(features.activations, scores), features.activations)

    def _taken(self, activations: Tensor) -> Tensor:
        """Which feature maps take part, (B, K) bool."""
        spread = activations.flatten(2).std(dim=2, correction=0)
        if self.channels is None or self.channels >= spread.shape[1]:
            return torch.ones_like(spread, dtype=torch.bool)
        chosen = spread.topk(self.channels, dim=1).indices
        return torch.zeros_like(spread, dtype=torch.bool).scatter_(1, chosen, True)

    def _scores(self, engine: PerturbationEngine, image: Tensor, masks: Tensor, target: Tensor) -> Tensor:
        """(n,): the target's score for the image seen through each of n masks."""

        def masked(channels: Tensor) -> Tensor:
            up = F.interpolate(masks[channels, None], image.shape[-2:], mode="bilinear", align_corners=False)
            return up * image

        return SCORES[self.score](engine.run(masked, len(masks)))[:, target]
