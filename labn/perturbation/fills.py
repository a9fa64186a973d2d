"""Fills for removed pixels: the substrate b of insertion and deletion, and of saliency-guided training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from labn.errors import InputError
from labn.perturbation.stateless_random import sample_uniform

Channels = Sequence[float] | Tensor

FILL_STREAM = 1  # random ties use stream 0; with one stream their order would be that of the fill's brightness


@dataclass(frozen=True)
class FillOptions:
    """The options of a fill; the fields are the keywords of `make_fill`."""

    mean: Channels | None = None
    std: Channels | None = None
    bias: Tensor | None = None
    indices: Tensor | None = None
    seed: int = 0
    kernel_size: int = 11
    sigma: float = 5.0


def _channels(values: Channels | None, default: float, images: Tensor) -> Tensor:
    """Numbers per channel as (1, C, 1, 1), in the images' dtype and on their device."""
    numbers = torch.as_tensor([default] if values is None else values, dtype=torch.float64).flatten()
    if len(numbers) not in (1, images.shape[1]):
        raise InputError(f"mean and std must have 1 or {images.shape[1]} values (one per channel), got {len(numbers)}.")
    return numbers.to(images.device, images.dtype).expand(images.shape[1]).view(1, -1, 1, 1)


def _normalise(pixels: Tensor, options: FillOptions, images: Tensor) -> Tensor:
    return (pixels - _channels(options.mean, 0.0, images)) / _channels(options.std, 1.0, images)


def to_pixels(images: Tensor, options: FillOptions) -> Tensor:
    """Pixel values in [0, 1] of normalised images (B, C, H, W); mean and std None: the images themselves."""
    return images * _channels(options.std, 1.0, images) + _channels(options.mean, 0.0, images)


def _black(images: Tensor, options: FillOptions) -> Tensor:
    return _normalise(images.new_zeros(1, images.shape[1], 1, 1), options, images)


def _mean(images: Tensor, options: FillOptions) -> Tensor:
    return images.new_zeros(1, images.shape[1], 1, 1)


def _bias(images: Tensor, options: FillOptions) -> Tensor:
    if options.bias is None:
        raise InputError("fill='bias' needs bias=, the training split's mean image (C, H, W) in pixel space [0, 1].")
    bias = options.bias.to(images).expand(1, *options.bias.shape[-3:])
    if bias.shape[1:] != images.shape[1:]:
        raise InputError(f"bias must be {tuple(images.shape[1:])} like the images, got {tuple(options.bias.shape)}.")
    return _normalise(bias, options, images)


def _image_mean(images: Tensor, options: FillOptions) -> Tensor:
    return images.mean((2, 3), keepdim=True)


def _uniform(images: Tensor, options: FillOptions) -> Tensor:
    """Noise U(min, max) of the sample's channel (Ismail et al., NeurIPS 2021), drawn from (seed, sample index)."""
    indices = torch.arange(len(images)) if options.indices is None else options.indices
    count = images[0].numel()
    noise = sample_uniform(options.seed, indices.to(images.device), count, images.dtype, FILL_STREAM).view_as(images)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return low + (high - low) * noise


def _separable(images: Tensor, weights: Tensor) -> Tensor:
    """Filter along both axes with one symmetric kernel; edge pixels are repeated outwards."""
    channels, side = images.shape[1], len(weights)
    kernel = weights.to(images).expand(channels, 1, 1, side)
    # An even kernel has its centre between two pixels; the extra pixel is taken on the right and below.
    before, after = (side - 1) // 2, side // 2
    rows = F.conv2d(F.pad(images, (before, after, 0, 0), mode="replicate"), kernel, groups=channels)
    return F.conv2d(F.pad(rows, (0, 0, before, after), mode="replicate"), kernel.transpose(2, 3), groups=channels)


def _blur(images: Tensor, options: FillOptions) -> Tensor:
    offset = torch.arange(options.kernel_size, dtype=torch.float64) - (options.kernel_size - 1) / 2
    weights = torch.exp(-0.5 * (offset / options.sigma) ** 2)
    return _separable(images, weights / weights.sum())


def _box(images: Tensor, options: FillOptions) -> Tensor:
    return _separable(images, torch.full((options.kernel_size,), 1 / options.kernel_size, dtype=torch.float64))


FILLS: dict[str, Callable[[Tensor, FillOptions], Tensor]] = {
    "black": _black,
    "mean": _mean,
    "bias": _bias,
    "blur": _blur,
    "box": _box,
    "uniform": _uniform,
    "image_mean": _image_mean,
}


def make_fill(
    name: str,
    images: Tensor,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    bias: Tensor | None = None,
    indices: Tensor | None = None,
    seed: int = 0,
    kernel_size: int = 11,
    sigma: float = 5.0,
) -> Tensor:
    """The fill that removed pixels show, in the images' normalised space and on their device.

    Args:
        name: "black" (0 in pixel space: -mean/std), "mean" (0 after normalisation), "bias" (the given image, ACCV
            2022), "blur" (Gaussian, 11x11 with sigma 5 as RISE's insertion), "box" (box blur), "uniform" (noise between
            the sample's channel minimum and maximum) or "image_mean" (the sample's own channel means).
        images: (B, C, H, W), normalised.
        mean: per-channel mean of the images' normalisation; None: the images are not normalised.
        std: per-channel standard deviation of the normalisation; None: likewise.
        bias: (C, H, W) in pixel space [0, 1], for "bias".
        indices: (B,) int64 sample indices, from which the noise of "uniform" is drawn; None: 0..B-1.
        seed: seed of "uniform".
        kernel_size: side of "blur" and "box" in pixels.
        sigma: standard deviation of "blur" in pixels.

    Returns:
        A tensor broadcastable to the images: (1, C, 1, 1), (1, C, H, W), (B, C, 1, 1) or (B, C, H, W).

    Raises:
        InputError: an unknown name, no bias image, or mean, std or bias that do not fit the images.

    Example:
        >>> images = torch.tensor([[[[1.0, 3.0]]]])
        >>> make_fill("image_mean", images), make_fill("black", images, mean=[0.5], std=[0.25])
        (tensor([[[[2.]]]]), tensor([[[[-2.]]]]))
    """
    return fill_with(name, images, FillOptions(mean, std, bias, indices, seed, kernel_size, sigma))


@torch.no_grad()
def fill_with(name: str, images: Tensor, options: FillOptions) -> Tensor:
    """`make_fill` with its keywords in one object."""
    if name not in FILLS:
        raise InputError(f"fill must be one of {sorted(FILLS)}, got {name!r}.")
    return FILLS[name](images, options)
