"""Linear imputation: removed pixels as weighted means of their neighbours (ROAD, Rong et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError

NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
"""Weights of the eight neighbours of a pixel."""


def linear_imputation(images: Tensor, known: Tensor, tolerance: float = 1e-5, max_steps: int = 2000) -> Tensor:
    """Replace unknown pixels so that each is the weighted mean of its neighbours, known or not; known ones stay.

    At the edge the mean is over the neighbours inside the image. The linear system, symmetric and positive definite, is
    solved for all images at once by conjugate gradients (Hestenes and Stiefel 1952), on the images' device. An image
    stops where its residual is small, so that the result does not depend on the other images.

    Args:
        images: (B, C, H, W).
        known: (B, H, W) bool, with a known pixel in every image.
        tolerance: norm of the residual, relative to that of the right side, at which an image is solved.
        max_steps: largest number of steps.

    Raises:
        InputError: masks of another size than the images, or an image without a known pixel.

    Example:
        >>> image, known = torch.tensor([[[[1.0, 9.0, 3.0]]]]), torch.tensor([[[True, False, True]]])
        >>> linear_imputation(image, known)
        tensor([[[[1., 2., 3.]]]])
    """
    if known.shape != (len(images), *images.shape[-2:]):
        raise InputError(f"known must be {(len(images), *images.shape[-2:])}, got {tuple(known.shape)}.")
    if not bool(known.flatten(1).any(1).all()):
        raise InputError("every image needs a known pixel to fill the unknown ones from.")
    unknown = (~known).to(images).unsqueeze(1)
    degree = _neighbour_sums(torch.ones_like(unknown))
    start = images * (1 - unknown)
    right = unknown * _neighbour_sums(start)

    def product(x: Tensor) -> Tensor:
        return unknown * (degree * x - _neighbour_sums(x))

    return start + _conjugate_gradients(product, right, tolerance, max_steps)


def _neighbour_sums(images: Tensor) -> Tensor:
    """Weighted sums of the eight neighbours; outside is 0."""
    channels = images.shape[1]
    kernel = torch.tensor(NEIGHBOURS, dtype=images.dtype, device=images.device).expand(channels, 1, 3, 3)
    return F.conv2d(images, kernel, padding=1, groups=channels)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, max_steps: int
) -> Tensor:
    """x with product(x) = right, for every image and channel of its own."""
    x, residual = torch.zeros_like(right), right
    direction, power = residual, residual.square().sum((2, 3), keepdim=True)
    goal = tolerance**2 * power
    for _ in range(max_steps):
        unsolved = power > goal
        if not bool(unsolved.any()):
            break
        image = product(direction)
        curvature = (direction * image).sum((2, 3), keepdim=True)
        # A solved channel does not move: its numbers would otherwise depend on how long the others take.
        step = torch.where(unsolved, power / torch.where(curvature > 0, curvature, 1), 0)
        x, residual = x + step * direction, residual - step * image
        new = residual.square().sum((2, 3), keepdim=True)
        direction = residual + torch.where(unsolved, new / torch.where(power > 0, power, 1), 0) * direction
        power = torch.where(unsolved, new, power)
    return x
