"""Small networks for the tests of explainers, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GapLinear(nn.Module):
    """Convolutions, global average pooling, one linear layer: y = W mean_ij(A) + b."""

    def __init__(self, channels: int = 6, classes: int = 4, bias: bool = True, inplace: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace),
            nn.Conv2d(5, channels, 3, stride=2, padding=1),
            nn.ReLU(inplace),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class DeepTail(GapLinear):
    """The same with a tail that is not linear in the feature maps."""

    def __init__(self, channels: int = 6, classes: int = 4) -> None:
        super().__init__(channels, classes)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(nn.Linear(4 * channels, 7), nn.ReLU(), nn.Linear(7, classes))


class Parameterless(nn.Module):
    """No parameters at all: sums of squares of the channels, pooled."""

    def forward(self, x: Tensor) -> Tensor:
        return (x**2).mean(dim=(2, 3)) * 3


def seeded(network: type[nn.Module] = GapLinear, seed: int = 0, **arguments: object) -> nn.Module:
    """A float64 network with random weights and running statistics that are not the default ones."""
    torch.manual_seed(seed)
    model = network(**arguments).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def pictures(count: int = 2, height: int = 16, width: int = 20, seed: int = 1) -> Tensor:
    """Seeded float64 images (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)
