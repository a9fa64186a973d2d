"""How much a map depends on the class: contrastive propagation, plain propagation and Grad-CAM on a trained ResNet-50.

    python tests/benchmarks/class_discrimination.py [--data imagenet] [--images 12] [--steps 10] [--threads 1]

For evenly spaced photographs of `$LABN_DATA/<data>` the maps of the most probable and of the second most probable
class are compared by their cosine; beside it insertion minus deletion (PID, 16-pixel patches, `--steps` steps) of the
first. Means with 95 % bootstrap intervals over photographs.
"""

from __future__ import annotations

import argparse
import os

import torch
from relevance_study import network, photographs
from torch import Tensor, nn

from labn import evaluate, explain
from labn.api import IMAGENET_MEAN, IMAGENET_STD
from labn.explainers.base import top_k
from labn.metrics.functional.detection import map_similarity
from labn.metrics.statistics import bootstrap_mean

METHODS = ("contrastive_lrp", "lrp", "gradcam")


def measure(model: nn.Module, image: Tensor, steps: int) -> dict[tuple[str, str], float]:
    """Values of one photograph (1, 3, 224, 224) by method and name."""
    first, second = top_k(model, image, 2)[0].tolist()
    found = {}
    for method in METHODS:
        maps = [explain(model, image, method, targets=target).maps for target in (first, second)]
        found[method, "similarity"] = float(map_similarity(*maps))
        found[method, "pid16"] = float(evaluate(model, image, maps[0], first, ["pid16"], n_steps=steps)["pid16"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="imagenet")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = photographs(arguments.images, (IMAGENET_MEAN, IMAGENET_STD), arguments.data)
    model, values = network("resnet50", None), {}
    for number, (file, image) in enumerate(chosen.items(), start=1):
        for key, value in measure(model, image, arguments.steps).items():
            values.setdefault(key, []).append(value)
        print(f"{number} of {len(chosen)}: {file}", flush=True)
        for (method, name), column in values.items() if number == len(chosen) else ():
            interval = bootstrap_mean(column)
            print(
                f"{method:16} {name:10} {interval.mean:6.3f} [{interval.low:6.3f}, {interval.high:6.3f}] {interval.n}"
            )


if __name__ == "__main__":
    os.environ.setdefault("LABN_DATA", "../shared/data")
    main()
