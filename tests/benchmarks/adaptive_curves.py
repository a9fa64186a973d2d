"""Adaptive insertion and deletion curves against all steps of the released table, on trained networks.

    python tests/benchmarks/adaptive_curves.py --network lite0 --weights FILE [--images 100] [--patches 16 1]

Networks and photographs are those of `relevance_study.py`. The predicted class of every photograph is explained by one
of five methods in turn. A case, one photograph at one patch size, has both curves at all steps; its row in `--out` is
written as soon as it is known, so that a second call goes on where the first one ended. The adaptive curves then take
their points from these rows. Printed are, by network, patch size and tolerance: the forwards of the table over those of
the adaptive curves, the share of cases whose PID deviates by at most the tolerance, the share whose deviation is at
most the stored bound, and the largest deviation.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from relevance_study import STATISTICS, network, photographs
from torch import Tensor

from labn.explainers.base import top_k
from labn.explainers.registry import explainer_by_name
from labn.metrics import PatchInsertionDeletion
from labn.metrics.functional.adaptive import adaptive_curves
from labn.perturbation.engine import PerturbationEngine

METHODS = ("gradcam", "lrp", "integrated_gradients", "random", "gradxinput")
Case = dict[str, Any]


def measure(options: argparse.Namespace, cases: list[Case]) -> None:
    """Add the curves of the photographs that are missing in `cases`, and write them after every photograph."""
    statistics = STATISTICS[options.network]
    model = network(options.network, options.weights)
    done = {(case["network"], case["image"], case["patch"]) for case in cases}
    for number, (image, pixels) in enumerate(photographs(options.images, statistics).items()):
        patches = [patch for patch in options.patches if (options.network, image, patch) not in done]
        if not patches:
            continue
        method, target = METHODS[number % len(METHODS)], top_k(model, pixels, 1)[0]
        maps = explainer_by_name(method)(model, pixels, target)
        engine = PerturbationEngine.for_model(model, pixels)
        for patch in patches:
            metric = PatchInsertionDeletion(patch, mean=statistics[0], std=statistics[1])
            curves = metric.curves(model, pixels, maps, target, torch.tensor([number]), cache=engine)
            both = torch.cat([curves.insertion, curves.deletion]).double()
            names = {"network": options.network, "image": image, "method": method, "patch": patch}
            cases.append({**names, "x": curves.x[0], "curves": both})
        torch.save(cases, options.out)


def pid(curves: Tensor, x: Tensor) -> Tensor:
    """Insertion minus deletion area (S,) of curves (S, 2, K)."""
    return torch.trapezoid(curves[:, 0] - curves[:, 1], x, dim=1)


def row(cases: list[Case], tolerance: float) -> str:
    """A row of the table for cases of one network and patch size."""
    x, curves = (torch.stack([case[name] for case in cases]) for name in ("x", "curves"))
    found = adaptive_curves(x, lambda samples, points: curves[samples].gather(2, points), tolerance)
    deviations = (pid(found.heights, x) - pid(curves, x)).abs()
    # Both curves end at the image and at the fill, which run once.
    ratio = (2 * x.shape[1] - 2) / (found.evaluated - 2).double().mean()
    within, covered = ((deviations <= limit + 1e-9).double().mean() for limit in (tolerance, found.error))
    first = cases[0]
    return (
        f"| {first['network']}, m = {first['patch']} | {len(cases)} | {tolerance} | {ratio:.2f} | {within:.3f} | "
        f"{covered:.3f} | {deviations.max():.4f} |"
    )


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(STATISTICS), required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--patches", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.002, 0.005, 0.01, 0.02])
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive_curves.pt"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cases = torch.load(options.out) if options.out.exists() else []
    measure(options, cases)
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case["network"], case["patch"]), []).append(case)
    print("| network | cases | tolerance | forwards of the table / adaptive | within | covered | largest deviation |")
    print("|---|---|---|---|---|---|---|")
    for group in groups.values():
        for tolerance in options.tolerances:
            print(row(group, tolerance))


if __name__ == "__main__":
    os.environ.setdefault("LABN_DATA", "../shared/data")
    main()
