"""Small networks of known structure for the tests of relevance propagation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def seeded(net: nn.Module, seed: int = 0, biased: bool = True) -> nn.Module:
    """float64, eval mode, every parameter and statistic drawn anew so that nothing is zero or one by accident."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                low = (
                    0.5 if name == "running_var" or (isinstance(module, nn.BatchNorm2d) and name == "weight") else -0.5
                )
                drawn = torch.rand(tensor.shape, generator=generator) + low
                tensor.data.copy_(drawn * (0.0 if name in ("bias", "running_mean") and not biased else 1.0))
    return net.double().eval()


def images(count: int = 2, side: int = 9, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(biased: bool = False, seed: int = 0) -> nn.Module:
    """Two convolutions with ReLU, a pool and two linear layers."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=biased), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, stride=2, bias=biased), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6, bias=biased), nn.ReLU(), nn.Linear(6, 3, bias=biased),
    )  # fmt: skip
    return seeded(net, seed, biased)


class Block(nn.Module):
    """A residual block that no library knows: other names, functional ReLU, in-place sum."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.one_norm = nn.BatchNorm2d(out)
        self.two = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.two_norm = nn.BatchNorm2d(out)
        self.skip = (
            nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if out != width else None
        )

    def forward(self, x: Tensor) -> Tensor:
        deep = self.two_norm(self.two(F.relu(self.one_norm(self.one(x)))))
        deep += x if self.skip is None else self.skip(x)
        return deep.relu_()


class SmallResNet(nn.Module):
    """Stem, an identity block, a downsampling block, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.first, self.second, self.third = Block(6, 6), Block(6, 8, 2), Block(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(self.stem(x)))).mean((2, 3)))


def small_resnet(seed: int = 0, biased: bool = True) -> nn.Module:
    return seeded(SmallResNet(), seed, biased)


def matrix_of(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A layer on inputs (1, *shape) as a dense matrix (out, in), its bias (out,), and its output shape."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        bias = layer(zero)
        basis = torch.eye(zero.numel(), dtype=torch.float64).view(-1, *shape)
        matrix = torch.stack([(layer(e[None]) - bias).flatten() for e in basis], 1)
    return matrix, bias.flatten(), tuple(bias.shape[1:])
