"""Models whose insertion and deletion curves are known in closed form."""

import torch
from torch import Tensor, nn


class Additive(nn.Module):
    """p(class 1 | x) = a + sum_j w_j x_j over channel means; for white images on black fill, over the kept pixels."""

    def __init__(self, weights: Tensor, base: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", weights.double())
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        p = self.base + (x.mean(1) * self.weights).flatten(1).sum(1)
        return torch.stack([torch.log1p(-p.clamp(max=1)), torch.log(p.clamp(min=0))], 1)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


class Wavy(nn.Module):
    """An arbitrary smooth, non-additive function of all pixels."""

    def __init__(self, pixels: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("first", torch.randn(pixels, 8, generator=generator, dtype=torch.float64))
        self.register_buffer("second", torch.randn(8, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ self.first) @ self.second


def score(metric, model, images, maps, labels=None, indices=None, **more):
    labels = torch.ones(len(images), dtype=torch.long) if labels is None else labels
    indices = torch.arange(len(images)) if indices is None else indices
    values = metric.score(model, images, maps, labels, indices, **more)
    return dict(zip(("insertion", "deletion", "pid", "fill_probability"), values.values()))


def white(*size):
    return torch.ones(1, 1, *size, dtype=torch.float64)


def even(*size):
    """Equal weights that sum to one."""
    return torch.ones(size, dtype=torch.float64).div(size[0] * size[1])


def distinct(seed: int, *size: int) -> torch.Tensor:
    """A map of distinct values."""
    pixels = size[0] * size[1]
    return torch.randperm(pixels, generator=torch.Generator().manual_seed(seed)).double().view(1, *size)
