"""1x1 convolutions at small batch on one thread: `python tests/benchmarks/pointwise_convolutions.py [--batch 4]`.

Process CPU time of forward / forward and backward over those of `conv2d` in the default memory format, medians, for
`conv2d` and matrix products in both memory formats at shapes of ResNet-50.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((256, 56, 64), (64, 56, 256), (512, 28, 128), (1024, 14, 256), (512, 7, 2048))  # channels in, side, out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution as a product of the weights and pixels in rows of channels."""
    return (weight.flatten(1) @ x.flatten(2)).unflatten(2, x.shape[-2:])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution as a linear layer of pixels, for channels_last."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.memory_format]] = {
    "conv2d": (F.conv2d, torch.contiguous_format),
    "product": (product, torch.contiguous_format),
    "conv2d, channels_last": (F.conv2d, torch.channels_last),
    "linear, channels_last": (linear, torch.channels_last),
}


def cost(name: str, batch: int, shape: tuple[int, int, int]) -> tuple[float, float]:
    """CPU seconds of forward, and of forward and backward."""
    form, memory = FORMS[name]
    channels, side, out = shape
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=memory).requires_grad_()
    weight = torch.randn(out, channels, 1, 1).contiguous(memory_format=memory).requires_grad_()
    start = time.process_time()
    y = form(x, weight)
    forward = time.process_time() - start
    grad = torch.ones_like(y)
    start = time.process_time()
    torch.autograd.grad(y, [x, weight], grad)
    return forward, forward + time.process_time() - start


def main() -> None:
    """Print one row per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = dict.fromkeys(FORMS, 0.0)
    for shape in SHAPES:
        rounds = [{name: cost(name, options.batch, shape) for name in FORMS} for _ in range(options.rounds)][1:]
        seconds = {name: [median(one[name][k] for one in rounds) for k in (0, 1)] for name in FORMS}
        plain = seconds["conv2d"]
        print(shape, ", ".join(f"{n} {s[0] / plain[0]:.2f} / {s[1] / plain[1]:.2f}" for n, s in seconds.items()))
        for name in FORMS:
            total[name] += seconds[name][1]
    print("forward and backward of all:", {name: round(t / total["conv2d"], 2) for name, t in total.items()})


if __name__ == "__main__":
    main()
