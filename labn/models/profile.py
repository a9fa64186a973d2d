"""Parameters, FLOPs and latency of a network, as the papers report them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from labn.errors import InputError
from labn.inference.modes import evaluating
from labn.models.lambda_networks.layer import LambdaLayer


@dataclass(frozen=True)
class Profile:
    """Size and cost of a network.

    Attributes:
        parameters: number of parameters.
        trainable: number of parameters that require a gradient.
        flops: floating point operations of one forward of one image; a multiply-add counts as two.
        latency: median seconds of one forward of one image.
    """

    parameters: int
    trainable: int
    flops: int
    latency: float


def profile(model: nn.Module, image: Tensor, repeats: int = 5) -> Profile:
    """Measure a network in eval mode on one image (C, H, W), on the image's device; the model is left as found."""
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
    """Operations of one forward on images (B, C, H, W), a multiply-add counting as two.

    Convolutions and matrix products are counted. Lambda layers are counted by their definition, the convolution of
    JSAI 2022, eq. 4, whatever faster formulation runs them, so that the figure depends on the network alone.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model, images.device.type), _by_definition(model), counter:
        model(images)
    return counter.get_total_flops()


@torch.no_grad()
def latency(model: nn.Module, images: Tensor, repeats: int = 5) -> float:
    """Median wall-clock seconds of one forward on images (B, C, H, W) in eval mode, after one forward to warm up.

    Raises:
        ValueError: repeats is below 1.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; at least one forward must be timed.")
    with evaluating(model, images.device.type):
        return median([_seconds(model, images) for _ in range(repeats + 1)][1:])


def _seconds(model: nn.Module, images: Tensor) -> float:
    _synchronise(images.device)
    start = time.perf_counter()
    model(images)
    _synchronise(images.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _by_definition(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LambdaLayer)]
    chosen = [layer.formulation for layer in layers]
    try:
        for layer in layers:
            layer.formulation = "conv2d"
        yield
    finally:
        for layer, formulation in zip(layers, chosen):
            layer.formulation = formulation
