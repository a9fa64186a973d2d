"""How good a detector's maps are: class discrimination, and what removing the supporting pixels does to a detection."""

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
    """Cosine of two sets of maps (T, H, W), (T,) float64 in [-1, 1]: near 1, the map hardly depends on what was asked.

    0 where one of two maps is all zero.
    """
    return torch.cosine_similarity(first.double().flatten(1), second.double().flatten(1), eps=1e-300)


@dataclass(frozen=True)
class RemovalCurves:
    """What T default boxes predict while the pixels that T maps rank highest are removed.

    Attributes:
        fractions: (F,) float64, how much is removed, as a share of each row's area.
        confidence: (T, F) float64, softmax probability of each row's class.
        offsets: (T, F, 4) float64, regression outputs cx, cy, w, h of each row's default box.
        variances: (4,) of the box code.
    """

    fractions: Tensor
    confidence: Tensor
    offsets: Tensor
    variances: Tensor

    @property
    def shifts(self) -> Tensor:
        """(T, F, 4) change against the whole image: of the centre in default-box sizes, of width and height as log."""
        return (self.offsets - self.offsets[:, :1]) * self.variances

    def mean_confidence(self) -> Tensor:
        """(T,) confidence averaged over the fractions above 0; low where the map found what the class rests on."""
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
    """Remove the patches that a map ranks highest and watch its default box, whatever else the detector then finds.

    Args:
        detector: as explained.
        image: (1, C, H, W), normalised.
        maps: (T, H, W); a map of relevance for "right" ranks first what should keep the box to the right.
        priors: T default boxes.
        labels: T class channels.
        fractions: ascending shares of `areas` to remove, the first one 0. The pixels may lie anywhere.
        areas: (T,) shares of the image, for example of the detected boxes, so that a small object is not removed
            altogether where a large one has lost a tenth; 1 is the whole image for every row.
        fill: what removed pixels show, broadcastable to the image; 0 is the mean colour after normalisation.
        patch_size: side of the patches in pixels; a patch is worth the sum of its relevance.
        chunk_size: images per forward.

    Raises:
        ValueError: the first fraction is not 0, or they do not ascend within [0, 1].
    """
    wanted = torch.as_tensor(fractions, dtype=torch.float64)
    if len(wanted) < 2 or wanted[0] != 0 or bool((wanted.diff() <= 0).any()) or wanted[-1] > 1:
        raise InputError(f"fractions must start with 0 and ascend to at most 1, got {list(fractions)}.")
    rows, classes = len(maps), detector.num_classes
    chosen = torch.as_tensor(list(priors), device=image.device)

    def units(batch: Tensor) -> Tensor:
        predictions = logits_of_units(detector, batch, chosen)
        return predictions.flatten(1)

    engine = PerturbationEngine(units, image, chunk_size=chunk_size)
    size = (image.shape[-2], image.shape[-1])
    values = patch_pool(maps.to(image), patch_size, "sum").flatten(1)
    ranks = ranks_to_pixels(patch_ranks(values, "stable"), patch_size, size)
    counts = (torch.as_tensor(areas, dtype=torch.float64).view(-1, 1) * wanted * values.shape[1]).round().long()
    samples = torch.zeros(rows, dtype=torch.long)
    with evaluating(detector, image.device.type):  # the engine knows the function alone, not the detector in it
        found = engine.masked(ranks, counts, fill, keep="rest", samples=samples)
    found = found.unflatten(2, (rows, classes + 4))[torch.arange(rows), :, torch.arange(rows)].double().cpu()
    probability = found[..., :classes].softmax(-1)[torch.arange(rows), :, torch.as_tensor(list(labels))]
    return RemovalCurves(wanted, probability, found[..., classes:], torch.tensor(detector.variances).double())


def logits_of_units(detector: Detector, images: Tensor, priors: Tensor) -> Tensor:
    """(B, T, K + 4): class logits and offsets of T default boxes."""
    predictions = detector(images)
    return torch.cat([predictions.classes[:, priors], predictions.offsets[:, priors]], 2)
