"""Decoding raw predictions to detections, each with the index of its default box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labn.models.detectors.base import Detector, Predictions


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first.

    Attributes:
        boxes: (n, 4) x1, y1, x2, y2 in pixels, clipped to the image.
        scores: (n,) softmax probability of the class.
        labels: (n,) int64 class channel (with background class: 1 is the first object class).
        priors: (n,) int64 index of the default box; suppression selects boxes and does not merge them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    priors: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def best(self, count: int) -> Detections:
        """The first `count` detections."""
        return Detections(self.boxes[:count], self.scores[:count], self.labels[:count], self.priors[:count])


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of detections (SSD, Liu et al. 2016, section 2.2).

    Attributes:
        score: smallest probability of a detection.
        overlap: IoU above which the lower-scored of two boxes of a class is suppressed.
        candidates: largest number of boxes per class before suppression.
        top_k: largest number of detections per image.
    """

    score: float = 0.01
    overlap: float = 0.45
    candidates: int = 400
    top_k: int = 200


def decode_boxes(offsets: Tensor, default_boxes: Tensor, variances: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)) -> Tensor:
    """Decode boxes: cx = d_cx + v0 t_cx d_w, cy = d_cy + v1 t_cy d_h, w = d_w exp(v2 t_w), h = d_h exp(v3 t_h).

    Args:
        offsets: (..., 4) regression outputs t.
        default_boxes: (..., 4) default boxes d: cx, cy, w, h.
        variances: factors v.

    Returns:
        (..., 4) cx, cy, w, h in the units of the default boxes; a positive t means right, down, wider, taller.

    Example:
        >>> decode_boxes(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([50.0, 50.0, 20.0, 10.0])).tolist()
        [52.0, 50.0, 20.0, 10.0]
    """
    centre, size = default_boxes[..., :2], default_boxes[..., 2:]
    v = offsets.new_tensor(variances)
    moved = centre + v[:2] * offsets[..., :2] * size
    return torch.cat([moved, size * torch.exp(v[2:] * offsets[..., 2:])], -1)


def corners(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from cx, cy, w, h to x1, y1, x2, y2.

    Example:
        >>> corners(torch.tensor([5.0, 4.0, 2.0, 6.0])).tolist()
        [4.0, 1.0, 6.0, 7.0]
    """
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def detect(
    detector: Detector, predictions: Predictions, size: tuple[int, int], thresholds: Thresholds | None = None
) -> list[Detections]:
    """Detections of every image, by score threshold, suppression per class and best `top_k`; there may be none.

    Args:
        detector: the detector, for its default boxes, box code and background class.
        predictions: raw predictions of the detector.
        size: (H, W) of the images in pixels.
        thresholds: thresholds; None takes the defaults.
    """
    chosen = thresholds or Thresholds()
    priors = detector.default_boxes(size, predictions.grids, predictions.offsets)
    boxes = corners(decode_boxes(predictions.offsets, priors, detector.variances))
    limits = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    scores = predictions.classes.softmax(-1)
    return [_one_image(b, s, detector.background, chosen) for b, s in zip(boxes, scores)]


def _one_image(boxes: Tensor, scores: Tensor, background: int | None, chosen: Thresholds) -> Detections:
    from torchvision.ops import batched_nms  # a second, which `import labn` need not cost

    objects = scores.clone()
    if background is not None:
        objects[:, background] = 0
    objects[objects <= chosen.score] = 0
    count = min(chosen.candidates, len(scores))
    values, priors = objects.T.topk(count, dim=1)  # (K, count)
    labels = torch.arange(scores.shape[1], device=scores.device)[:, None].expand_as(priors)
    is_candidate = values > 0
    values, priors, labels = values[is_candidate], priors[is_candidate], labels[is_candidate]
    keep = batched_nms(boxes[priors], values, labels, chosen.overlap)[: chosen.top_k]
    return Detections(boxes[priors[keep]], values[keep], labels[keep], priors[keep])
