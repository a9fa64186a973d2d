"""Score-CAM: weights from the scores of the image seen through each feature map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.explainers.cam import ActivationMap
from labn.explainers.features import layer_features
from labn.explainers.targets import check_targets
from labn.perturb import PerturbationEngine


def unit_range(maps: Tensor) -> Tensor:
    """Every map (..., h, w) brought to [0, 1] by its own minimum and maximum; a constant one becomes 0."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, 0)


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
    """

    def __init__(
        self,
        target_layer: str | None = None,
        relu: bool = True,
        score: str = "logit",
        weighting: str = "softmax",
        chunk_size: int | None = None,
        fold: bool = True,
    ) -> None:
        super().__init__(target_layer, relu)
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
        self.score, self.weighting, self.chunk_size, self.fold = score, weighting, chunk_size, fold

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) from A and the scores (B, K + 1), whose last column is the baseline's."""
        weigh = WEIGHTINGS[self.weighting]
        return torch.stack([weigh(row[:-1], row[-1]) for row in gradients])[:, :, None, None]

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """(B, h, w) weighted sum at the layer's resolution."""
        features = layer_features(model, self.layer(model, images), images)
        check_targets(targets, features.logits.shape[1])
        engine = PerturbationEngine(model, images, chunk_size=self.chunk_size, fold=self.fold)
        scores = [
            self._scores(engine, image, masks, target)
            for image, masks, target in zip(images, unit_range(features.activations), targets)
        ]
        return self.weigh(self.weights(features.activations, torch.stack(scores)), features.activations)

    def _scores(self, engine: PerturbationEngine, image: Tensor, masks: Tensor, target: Tensor) -> Tensor:
        """(K + 1,): the target's score for the image seen through each mask, then for the baseline."""

        def masked(channels: Tensor) -> Tensor:
            up = F.interpolate(masks[channels, None], image.shape[-2:], mode="bilinear", align_corners=False)
            return up * image

        logits = torch.cat([engine.run(masked, len(masks)), engine.filled(0.0)[:1]])
        return SCORES[self.score](logits)[:, target]
