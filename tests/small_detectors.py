"""A single-shot detector of one's own in about 30 lines, and SSD300 with very few channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.models.detectors import Detector, Head, Predictions, TorchvisionSSD, per_box, ssd300


class TinySSD(Detector):
    """Two source maps (8 x 8 and 4 x 4 cells of a 32 x 32 image), two default boxes per cell, no biases."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.low = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.high = nn.Sequential(nn.Conv2d(8, 10, 3, stride=2, padding=1, bias=False), nn.ReLU(inplace=True))
        self.classify = nn.ModuleList(nn.Conv2d(c, 2 * num_classes, 3, padding=1, bias=False) for c in (8, 10))
        self.locate = nn.ModuleList(nn.Conv2d(c, 2 * 4, 3, padding=1, bias=False) for c in (8, 10))

    def forward(self, images: Tensor) -> Predictions:
        low = self.low(images)
        maps = [low, self.high(low)]
        classes = [per_box(head(m), self.num_classes) for head, m in zip(self.classify, maps)]
        offsets = [per_box(head(m), 4) for head, m in zip(self.locate, maps)]
        grids = tuple((m.shape[2], m.shape[3]) for m in maps)
        return Predictions(torch.cat(classes, 1), torch.cat(offsets, 1), grids)

    def heads(self) -> tuple[Head, ...]:
        return tuple(Head(f"classify.{n}", f"locate.{n}", boxes=2) for n in range(2))

    def default_boxes(self, size: tuple[int, int], grids: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
        boxes = [
            [(column + 0.5) * size[1] / w, (row + 0.5) * size[0] / h, side * size[1] / w, side * size[0] / h]
            for h, w in grids
            for row in range(h)
            for column in range(w)
            for side in (1.0, 2.0)
        ]
        return like.new_tensor(boxes)


def tiny(num_classes: int = 4, dtype: torch.dtype = torch.float64) -> TinySSD:
    torch.manual_seed(0)
    return TinySSD(num_classes).to(dtype).eval()


def slim(num_classes: int = 4, dtype: torch.dtype = torch.float64, batchnorm: bool = False) -> TorchvisionSSD:
    """SSD300 with a sixteenth of the channels; all biases are 0."""
    torch.manual_seed(0)
    return ssd300(num_classes, width=1 / 16, batchnorm=batchnorm).to(dtype).eval()


def picture(detector: Detector, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """One normalised image (1, 3, H, W) of the detector's size."""
    side = 300 if isinstance(detector, TorchvisionSSD) else 32
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
