"""Scores of a detector's maps: class discrimination, and the change of detections when pixels are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError
from labn.inference.modes import evaluating
from labn.models.detectors import Detector
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.patches import patch_pool, patch_ranks, ranks_to_pixels

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.4)


def map_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity of two sets of maps; near 1 the maps hardly depend on the explained class.

    Args:
        first: (T, H, W).
        second: (T, H, W).

    Returns:
        (T,) float64 in [-1, 1]; 0 where one of the two maps is all zero.

    Example:
        >>> map_similarity(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        tensor([0.7071], dtype=torch.float64)
    """
    # eps bounds the product of the norms from below: relevance may be far smaller than the default of 1e-8.
    return torch.cosine_similarity(first.double().flatten(1), second.double().flatten(1), eps=1e-300)


@dataclass(frozen=True)
class RemovalCurves:
    """Predictions of T default boxes while the highest-ranked pixels of T maps are removed.

    Attributes:
        fractions: (F,) float64, removed share of each detection's area.
        confidence: (T, F) float64, softmax probability of each detection's class.
        offsets: (T, F, 4) float64, regression outputs cx, cy, w, h of each detection's default box.
        variances: (4,) float64, scales of the box coding (SSD's 0.1, 0.1, 0.2, 0.2).
    """

    fractions: Tensor
    confidence: Tensor
    offsets: Tensor
    variances: Tensor

    @property
    def shifts(self) -> Tensor:
        """(T, F, 4) change against the whole image: centre in default-box sizes, width and height as logarithms."""
        return (self.offsets - self.offsets[:, :1]) * self.variances

    def mean_confidence(self) -> Tensor:
        """(T,) confidence averaged over the fractions above 0; low where the map found the evidence for the class."""
        return self.confidence[:, self.fractions > 0].mean(1)

    def mean_shifts(self) -> Tensor:
        """(T, 4) shift of every coordinate averaged over the fractions above 0."""
        return self.shifts[:, self.fractions > 0].mean(1)


def removal_curves(
    detector: Detector,
    image: Tensor,
    maps: Tensor,
    priors: Sequence[int],
    labels: Sequence[int],
    fractions: Sequence[float] = FRACTIONS,
    areas: Tensor | float = 1.0,
    fill: Tensor | float = 0.0,
    patch_size: int = 4,
    chunk_size: int | None = None,
) -> RemovalCurves:
    """Remove the patches that a map ranks highest and read the predictions of one fixed default box.

    The default box stays the same during the removal, even where non-maximum suppression would choose another one.

    Args:
        detector: the explained detector; not changed.
        image: (1, C, H, W), normalised.
        maps: (T, H, W), one per detection.
        priors: T numbers of default boxes.
        labels: T class channels.
        fractions: ascending shares of `areas` to remove, the first one 0. The pixels may lie anywhere.
        areas: (T,) areas of the detected boxes as shares of the image, so that small and large objects lose the same
            share of their box; 1 takes the fractions of the whole image.
        fill: what removed pixels show, broadcastable to the image; 0 is the mean colour after normalisation.
        patch_size: side of the patches in pixels; the importance of a patch is the sum of its relevance.
        chunk_size: images per forward.

    Raises:
        InputError: fractions that do not start with 0 or do not ascend within [0, 1].
    """
    shares = torch.as_tensor(fractions, dtype=torch.float64)
    if len(shares) < 2 or shares[0] != 0 or bool((shares.diff() <= 0).any()) or shares[-1] > 1:
        raise InputError(f"fractions must start with 0 and ascend to at most 1, got {list(fractions)}.")
    detections, classes = len(maps), detector.num_classes
    chosen = torch.as_tensor(list(priors), device=image.device)

    def predictions_of_boxes(batch: Tensor) -> Tensor:
        return predict_default_boxes(detector, batch, chosen).flatten(1)

    engine = PerturbationEngine(predictions_of_boxes, image, chunk_size=chunk_size)
    size = (image.shape[-2], image.shape[-1])
    values = patch_pool(maps.to(image), patch_size, "sum").flatten(1)
    ranks = ranks_to_pixels(patch_ranks(values, "stable"), patch_size, size)
    counts = (torch.as_tensor(areas, dtype=torch.float64).view(-1, 1) * shares * values.shape[1]).round().long()
    samples = torch.zeros(detections, dtype=torch.long)
    # The engine gets a function and cannot set the detector inside it to eval mode.
    with evaluating(detector, image.device.type):
        outputs = engine.masked(ranks, counts, fill, keep="rest", samples=samples)
    # Every forward returns all T default boxes; map t is read at default box t alone, the diagonal of (T, F, T, K + 4).
    diagonal = torch.arange(detections)
    outputs = outputs.unflatten(2, (detections, classes + 4))[diagonal, :, diagonal].double().cpu()
    probability = outputs[..., :classes].softmax(-1)[diagonal, :, torch.as_tensor(list(labels))]
    return RemovalCurves(shares, probability, outputs[..., classes:], torch.tensor(detector.variances).double())


def predict_default_boxes(detector: Detector, images: Tensor, priors: Tensor) -> Tensor:
    """Class logits and box offsets (B, T, K + 4) of T default boxes."""
    predictions = detector(images)
    return torch.cat([predictions.classes[:, priors], predictions.offsets[:, priors]], 2)
