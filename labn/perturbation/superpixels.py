"""Superpixels: SLIC, the division of an image into compact regions of one colour."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from labn.errors import InputError


def slic(images: Tensor, n_segments: int = 64, compactness: float = 10.0, iterations: int = 10) -> Tensor:
    """SLIC superpixels (Achanta et al., TPAMI 2012): k-means over colour and position from a grid of centres.

        D^2 = |colour - colour'|^2 + (compactness / S)^2 |position - position'|^2,   S = (H W / n_segments)^(1/2)

    A pixel belongs to the nearest of the nine centres that start around it. Colours are CIELAB for three channels, else
    100 times the values. Regions keep pieces that lie apart: the paper's last step, which joins small ones to their
    neighbours, is left out. Distances are computed in float64 on the CPU, colours in float32, image by image.

    Args:
        images: (B, C, H, W), pixel values in [0, 1].
        n_segments: number of centres, about; regions that end up without a pixel are dropped.
        compactness: weight of the position against the colour.
        iterations: number of rounds of k-means.

    Returns:
        (B, H, W) int64 on the CPU, from 0, without gaps.

    Raises:
        InputError: `n_segments` or `iterations` below 1, or a compactness that is not above 0.

    Example:
        >>> slic(torch.tensor([[[[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]]]), n_segments=2)
        tensor([[[0, 0, 0, 1],
                 [0, 0, 0, 1]]])
    """
    if n_segments < 1 or iterations < 1 or not compactness > 0:
        raise InputError(
            f"n_segments and iterations must be at least 1 and compactness above 0, got {n_segments}, {iterations} and "
            f"{compactness}."
        )
    return torch.stack([_slic(image, n_segments, compactness, iterations) for image in images.detach().cpu()])


def _slic(image: Tensor, n_segments: int, compactness: float, iterations: int) -> Tensor:
    height, width = image.shape[-2:]
    spacing = (height * width / n_segments) ** 0.5
    rows, columns = (min(side, max(1, round(side / spacing))) for side in (height, width))
    y, x = torch.arange(height), torch.arange(width)
    row, column = (y * rows // height)[:, None].expand(-1, width), (x * columns // width).expand(height, -1)
    position = torch.stack(torch.meshgrid(y.double(), x.double(), indexing="ij"), -1) * (compactness / spacing)
    points = torch.cat([_colours(image), position], -1).flatten(0, 1)
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    near = torch.stack(
        [(row + d).clamp(0, rows - 1) * columns + (column + r).clamp(0, columns - 1) for d, r in steps], -1
    ).flatten(0, 1)
    labels = (row * columns + column).flatten()
    centres = torch.zeros(rows * columns, points.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        centres = _means(points, labels, centres)
        distance = torch.stack([(points - centres[candidate]).square().sum(1) for candidate in near.T])
        labels = near.gather(1, distance.argmin(0)[:, None])[:, 0]
    return labels.unique(return_inverse=True)[1].view(height, width)


def _means(points: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """The mean of the points of every label; that of `before` for a label without points."""
    counts = labels.bincount(minlength=len(before))[:, None]
    sums = torch.zeros_like(before).index_add_(0, labels, points)
    return torch.where(counts > 0, sums / counts.clamp(min=1), before)


def _colours(image: Tensor) -> Tensor:
    """(H, W, C) float64, on the scale of CIELAB, whose lightness goes up to 100."""
    pixels = image.clamp(0, 1).permute(1, 2, 0)
    if image.shape[0] != 3:
        return 100 * pixels.double()
    return torch.from_numpy(cv2.cvtColor(np.ascontiguousarray(pixels.float().numpy()), cv2.COLOR_RGB2LAB)).double()
