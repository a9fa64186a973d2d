"""Score-CAM: weights from the scores of the image masked by each feature map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import check_targets
from labn.explainers.cam.features import layer_features, wide
from labn.explainers.cam.gradcam import ActivationMap
from labn.perturbation.engine import REDUCED_REVISION, PerturbationEngine, check_precision
from labn.postprocess import unit_range


def _softmax_of_gain(scores: Tensor, baseline: Tensor) -> Tensor:
    return (scores - baseline).softmax(dim=0)


def _gain(scores: Tensor, baseline: Tensor) -> Tensor:
    return scores - baseline


def _score(scores: Tensor, baseline: Tensor) -> Tensor:
    return scores


# (K,) scores of the masked images, score of the baseline -> (K,) weights.
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
        target_layer: name of the layer; None: the last one with spatial feature maps.
        relu: apply the ReLU to the map; without it the map is signed.
        score: "logit" (the equations) or "probability".
        weighting: "softmax" over the channels of the gain above the baseline (the equations), "gain" without the
            softmax, or "score" without both; the authors' released code is score="probability", weighting="score".
        chunk_size: masked images per forward; None: chosen by the engine. The map does not depend on it.
        fold: whether the forwards may run on a copy with BatchNorm folded, which is equal up to rounding.
        channels: number of feature maps used per image, those with the largest spatial standard deviation; the others
            get the weight 0, because a map that hardly varies hardly masks. None: all.
        precision: precision of these forwards, "fp32" (the images' own dtype) or "bf16" (autocast).

    Raises:
        InputError: an unknown score, weighting or precision, or `channels` below 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import ScoreCAM
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> ScoreCAM()(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
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

    @property
    def revision(self) -> int:
        """Earlier versions also reduced layers that a model keeps outside of autocast."""
        return super().revision + (REDUCED_REVISION if self.precision != "fp32" else 0)

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """w (B, K, 1, 1) from A and the scores (B, K + 1), passed as `gradients`; the last column is the baseline's."""
        weights = torch.zeros_like(gradients[:, :-1])
        for of_image, scores, used in zip(weights, gradients, self._used(activations)):
            of_image[used] = WEIGHTINGS[self.weighting](scores[:-1][used], scores[-1])
        return weights[:, :, None, None]

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, h, w): weighted sums at the layer's resolution."""
        features = layer_features(model, self.layer(model, images), images)
        check_targets(targets, features.logits.shape[1])
        engine = PerturbationEngine.for_model(
            model, images, chunk_size=self.chunk_size, fold=self.fold, precision=self.precision
        )
        baselines = SCORES[self.score](wide(engine.filled(0.0))).gather(1, targets[:, None])
        scores = torch.cat([torch.zeros_like(features.activations[:, :, 0, 0]), baselines], dim=1)
        for of_image, image, maps, used, target in zip(
            scores, images, features.activations, self._used(features.activations), targets
        ):
            of_image[:-1][used] = self._scores(engine, image, unit_range(maps[used]), target)
        return self.weigh(self.weights(features.activations, scores), features.activations)

    def _used(self, activations: Tensor) -> Tensor:
        """Which feature maps mask the image, (B, K) bool."""
        spread = activations.flatten(2).std(dim=2, correction=0)
        if self.channels is None or self.channels >= spread.shape[1]:
            return torch.ones_like(spread, dtype=torch.bool)
        largest = spread.topk(self.channels, dim=1).indices
        return torch.zeros_like(spread, dtype=torch.bool).scatter_(1, largest, True)

    def _scores(self, engine: PerturbationEngine, image: Tensor, masks: Tensor, target: Tensor) -> Tensor:
        """The target's score (n,) for the image multiplied by each of n masks."""

        def masked(channels: Tensor) -> Tensor:
            # Masks are resized chunk by chunk; all K at image size would not fit.
            up = F.interpolate(masks[channels, None], image.shape[-2:], mode="bilinear", align_corners=False)
            # The masks of a half-precision network are float32; the masked images must have the network's dtype.
            return (up * image).to(image.dtype)

        return SCORES[self.score](wide(engine.run(masked, len(masks))))[:, target]
