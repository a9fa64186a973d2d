"""Number of parameters, FLOPs and latency of a network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.modes import evaluating
from labn.models.lambda_networks.layer import LambdaLayer


@dataclass(frozen=True)
class Profile:
    """Size and cost of a network.

    Attributes:
        parameters: number of parameters.
        trainable: number of parameters that require a gradient.
        flops: floating point operations of a forward pass of one image; a multiply-add counts as two.
        latency: median seconds of a forward pass of one image.
    """

    parameters: int
    trainable: int
    flops: int
    latency: float


def profile(model: nn.Module, image: Tensor, repeats: int = 5) -> Profile:
    """Measure a network in eval mode with one image (C, H, W), on the image's device; modes are restored afterwards.

    Example:
        >>> profile(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(3, 2, 2), repeats=1).parameters
        26
    """
    batch = image.unsqueeze(0)
    parameters = list(model.parameters())
    return Profile(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        flops=count_flops(model, batch),
        latency=latency(model, batch, repeats),
    )


@torch.no_grad()
def count_flops(model: nn.Module, images: Tensor) -> int:
    """Number of floating point operations of a forward pass of images (B, C, H, W); a multiply-add counts as two.

    Convolutions and matrix products are counted. Lambda layers are counted as the convolution of JSAI 2022, eq. 4,
    whichever faster formulation they run in, so that the number depends on the network alone.

    Example:
        >>> count_flops(nn.Conv2d(3, 4, 1, bias=False), torch.zeros(1, 3, 5, 5))
        600
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, half a second

    counter = FlopCounterMode(display=False)
    with evaluating(model, images.device.type), _by_definition(model), counter:
        model(images)
    return counter.get_total_flops()


@torch.no_grad()
def latency(model: nn.Module, images: Tensor, repeats: int = 5) -> float:
    """Median wall-clock seconds of a forward pass of images (B, C, H, W) in eval mode, after one to warm up.

    Raises:
        InputError: `repeats` is below 1.

    Example:
        >>> latency(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 5, 5), repeats=1) > 0
        True
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; it must be at least 1.")
    with evaluating(model, images.device.type):
        return median([_seconds(model, images) for _ in range(repeats + 1)][1:])


def _seconds(model: nn.Module, images: Tensor) -> float:
    _synchronise(images.device)
    start = time.perf_counter()
    model(images)
    _synchronise(images.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    # CUDA kernels run asynchronously: without waiting, only their launch would be timed.
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _by_definition(model: nn.Module) -> Iterator[None]:
    """Run all lambda layers as convolutions, as they are defined."""
    layers = [module for module in model.modules() if isinstance(module, LambdaLayer)]
    chosen = [layer.formulation for layer in layers]
    try:
        for layer in layers:
            layer.formulation = "conv2d"
        yield
    finally:
        for layer, formulation in zip(layers, chosen):
            layer.formulation = formulation
