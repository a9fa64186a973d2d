"""Maps of networks trained on IDRiD: accuracy, PID, and agreement with the lesion masks, over seeds.

    python tests/benchmarks/fundus_maps.py runs/idrid_labn_quantile_gate/seed=* --out runs/fundus_maps [--images 32]
        [--sizes 4 8 16] [--maps labn -labn gated gradcam random] [--ties random] [--checkpoint last]

Every run folder gives one file in `<out>`, which a second call does not make again. PID (10 steps, black fill, forwards
of perturbed images in bfloat16) is of evenly spaced positive test images. The lesion figures are of the validation and
test images with masks, which no training has seen. `gated` is LABN's map with what the gate stops set to 0. A method
that the network does not suit is left out. `mass` is relative to that of a uniform map. Another
`--ties` needs another `--out`.

The last table has differences of methods over all runs: the mean, and the 95 % interval over resampled runs and images,
drawn independently of each other.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from datamodules import IDRiD
from labn.errors import InputError
from labn.explainers import Explainer, explainer_by_name
from labn.metrics import metric_by_name
from labn.modules.restore import restore
from labn.perturbation.engine import PerturbationEngine

BATCH = 8
LESIONS = ("auroc", "mass", "iou")
Values = dict[str, list[float]]


def method(name: str) -> Explainer:
    """The explainer of a name; `gated` is LABN's map behind the gate."""
    if name == "rise":
        return explainer_by_name(name, n_masks=2000)
    return explainer_by_name("labn", explain_map="thresholded") if name == "gated" else explainer_by_name(name)


def split(data: IDRiD, stage: str) -> dict[str, Tensor]:
    """All images of a split in one batch."""
    loader = {"val": data.val_dataloader, "test": data.test_dataloader}[stage]()
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "mask", "index")}


@torch.no_grad()
def skill(network: nn.Module, images: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy, and AUROC of the probability of the positive class."""
    outputs = [network(chunk) for chunk in images["image"].split(16)]
    logits = torch.cat([getattr(output, "logits", output) for output in outputs])
    hits = (logits.argmax(1) == images["label"]).float()
    return {"accuracy": float(hits.mean()), "auroc": float(binary_auroc(logits.softmax(1)[:, 1], images["label"]))}


def pid(network: nn.Module, data: IDRiD, test: dict[str, Tensor], options: argparse.Namespace) -> dict[str, Values]:
    """PID of every method and patch size on evenly spaced positive test images."""
    positive = torch.nonzero(test["label"] > 0)[:, 0]
    count = min(options.images, len(positive))
    found: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    for rows in positive[torch.linspace(0, len(positive) - 1, count).round().long()].split(BATCH):
        images, labels, indices = (test[key][rows] for key in ("image", "label", "index"))
        engine = PerturbationEngine.for_model(network, images, indices=indices, precision="bf16")
        for name in options.maps:
            try:
                maps = method(name)(network, images, labels, indices)
            except InputError:
                continue
            for size in options.sizes:
                value = f"pid{size}@{options.ties}" if options.ties else f"pid{size}"
                metric = metric_by_name(value, mean=data.mean, std=data.std, bias=None, fill="black", n_steps=10)
                scores = metric.score(network, images, maps, labels, indices, labels=labels, cache=engine)
                found[name][f"pid{size}"] += scores[value].tolist()
    return found


def lesions(network: nn.Module, images: dict[str, Tensor], names: list[str]) -> dict[str, Values]:
    """Agreement of the maps with the lesions, on the images that have masks."""
    rows = torch.nonzero(images["mask"].flatten(1).any(1))[:, 0]
    batch, labels, indices, masks = (images[key][rows] for key in ("image", "label", "index", "mask"))
    found: dict[str, Values] = defaultdict(dict)
    for name in names:
        try:
            maps = method(name)(network, batch, labels, indices)
        except InputError:
            continue
        for metric in LESIONS:
            scorer = metric_by_name(metric, mean=None, std=None, bias=None)
            values = scorer.score(network, batch, maps, labels, indices, labels=labels, masks=masks)[metric]
            uniform = masks.flatten(1).double().mean(1) if metric == "mass" else 1
            found[name][metric] = (values.double() / uniform).tolist()
    return found


def study(run: Path, options: argparse.Namespace) -> dict[str, dict]:
    """All figures of one run."""
    network, preparation = restore(run / "checkpoints" / f"{options.checkpoint}.ckpt")
    network.eval()
    assert preparation is not None
    data = IDRiD(image_size=preparation.image_size, batch_size=16)
    data.setup("fit")
    data.setup("test")
    val, test = split(data, "val"), split(data, "test")
    named = [name for name in options.maps if name != "random"]
    return {
        "skill": {"val": skill(network, val), "test": skill(network, test)},
        "pid": pid(network, data, test, options),
        "lesions": {"val": lesions(network, val, named), "test": lesions(network, test, named)},
    }


def difference(first: np.ndarray, second: np.ndarray, draws: int = 10_000) -> str:
    """Mean of first - second (runs, images) with its 95 % interval over resampled runs and images."""
    values, generator = first - second, np.random.default_rng(0)
    runs, images = values.shape
    counts = generator.multinomial(runs, np.full(runs, 1 / runs), draws) / runs
    shares = generator.multinomial(images, np.full(images, 1 / images), draws) / images
    low, high = np.quantile(np.einsum("dr,ri,di->d", counts, values, shares), [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{np.mean(values):.3f} ({np.std(values, ddof=1) / len(values) ** 0.5:.3f})"


def both(found: dict, name: str, metric: str) -> list[float]:
    """The lesion figures of a method on the images of both splits."""
    return [*found["lesions"]["val"][name][metric], *found["lesions"]["test"][name][metric]]


def show_runs(studies: dict[str, dict], sizes: list[int]) -> None:
    """Print one row per run and method."""
    heads = ["run", "test accuracy / AUROC", "method", *(f"pid{m}" for m in sizes)]
    heads += [f"{name}, val; test" for name in ("lesion AUROC", "mass / uniform", "IoU")]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for run, found in studies.items():
        answers = found["skill"]["test"]
        for name, values in found["pid"].items():
            cells = [run, f"{answers['accuracy']:.3f} / {answers['auroc']:.3f}", name]
            cells += [spread(values[f"pid{m}"]) for m in sizes]
            if name in found["lesions"]["val"]:
                splits = [found["lesions"][stage][name] for stage in ("val", "test")]
                cells += ["; ".join(spread(each[metric]) for each in splits) for metric in LESIONS]
            print(f"| {' | '.join(cells)} |")


def show_differences(studies: dict[str, dict], names: list[str], sizes: list[int]) -> None:
    """Print the first method of `names` minus each of the others, over all runs."""
    own, *others = [name for name in names if all(name in found["pid"] for found in studies.values())]
    heads = [f"{own} minus", *(f"pid{m}" for m in sizes), *(f"lesion {metric}" for metric in LESIONS)]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for other in others:
        rows = [
            [np.array([found["pid"][name][f"pid{m}"] for found in studies.values()]) for name in (own, other)]
            for m in sizes
        ]
        if all(other in found["lesions"]["val"] for found in studies.values()):
            rows += [
                [np.array([both(found, name, metric) for found in studies.values()]) for name in (own, other)]
                for metric in LESIONS
            ]
        print(f"| {other} | {' | '.join(difference(*pair) for pair in rows)} |")


def main() -> None:
    """Study every run and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--maps", nargs="+", default=["labn", "-labn", "gated", "gradcam", "random"])
    parser.add_argument("--ties", help="stable, random or threshold; tied patches enter together by default")
    parser.add_argument("--checkpoint", default="last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    studies = {}
    for run in options.runs:
        file = options.out / f"{run.parent.name}_{run.name}.json"
        if not file.exists():
            file.write_text(json.dumps(study(run, options)))
        studies[run.name] = json.loads(file.read_text())
    show_runs(studies, options.sizes)
    show_differences(studies, options.maps, options.sizes)


if __name__ == "__main__":
    main()
