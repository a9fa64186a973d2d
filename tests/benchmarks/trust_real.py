"""Which metric ranks explanations as masks and boxes do: Kendall's tau to localisation on IDRiD and CUB.

    python tests/benchmarks/trust_real.py --out runs/trust_real [--images 12] [--steps 4] [--only idrid cub]

The trained ResNet-50 of `$LABN_DATA/imagenet` gets a new last layer for IDRiD (healthy or not) and for the birds of
`$LABN_DATA/cub10`, by logistic regression on its pooled features of the training images. Explained are held-out images
that the network gets right: of IDRiD those of validation and test that have lesion masks, of the birds the test images
whose box leaves out at least a quarter of the picture. The metrics' rankings of the methods are compared with those by
`mass`, `auroc` and `iou` as in `trust.py`, which this shares its code with: heads (`<out>/networks/`), maps and scores
of every batch are saved, and a second call goes on where the first one ended.

Written to `<out>`: `trust_<data>.csv`, a row per metric and fill with tau to each of the three and its 95 % interval
over resampled images; `methods_<data>.csv`, the means of the three per method.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trust import Group, Log, Scored, Study, Trained, read_scores, save_rows, table

from datamodules import CUB, IDRiD, ImageDataModule
from datamodules.base import data_root
from labn.explainers import Explainer, explainer_by_name
from labn.models import load_backbone
from labn.perturbation.engine import PerturbationEngine

SIDE, BATCH = 128, 2
TRUTHS = ("mass", "auroc", "iou")
FILLS = ("black", "blur", "bias")
NETWORKS = {name: Trained(name, "resnet50", 0) for name in ("idrid", "cub")}
HELD_OUT = {"idrid": ("val", "test"), "cub": ("test",)}
LARGEST_REGION = 0.75  # share of the picture; of a larger region localisation says little

METHODS: dict[str, dict[str, Any]] = {
    "cam": {},
    "layercam": {},
    "gradcam++": {},
    "gradient": {"channels": "l2"},
    "gradxinput": {},
    "integrated_gradients": {"n_steps": 4},
    "smoothgrad": {"n_samples": 4, "channels": "l2"},
    "guided_backprop": {},
    "lrp": {},
    "occlusion": {"window": 32, "stride": 16},
    "rise": {"n_masks": 64, "sampler": "orthogonal"},
    "random": {},
    "constant": {},
    "sobel": {},
}


def groups(steps: int) -> list[Group]:
    """Everything that is scored, localisation first."""
    found = [Group("", (*TRUTHS, "sparseness"))]
    for fill in FILLS:
        found.append(Group(fill, ("sensitivity_n", "infidelity"), (("draws", 8), ("sizes", (0.1, 0.3, 0.5)))))
        found.append(Group(fill, ("pid16",), (("n_steps", steps),)))
    found.append(Group("blur", ("id",), (("n_steps", steps),)))
    found.append(Group("blur", ("pctin_logit10",)))
    found.append(Group("", ("average_drop", "percent_increase")))
    return found


def data_of(name: str) -> ImageDataModule:
    """A data set, whose training images are not augmented."""
    data: ImageDataModule = {
        "idrid": lambda: IDRiD(image_size=SIDE, augmentation=None),
        "cub": lambda: CUB(image_size=SIDE, resize=SIDE + 16, augmentation=None),
    }[name]()
    data.setup("fit")
    data.setup("test")
    return data


def logits_of(model: nn.Module, data: ImageDataModule, split: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels of all images of a split."""
    samples = data.dataset(split)
    with torch.no_grad():
        logits = [model(samples[k]["image"][None]) for k in range(len(samples))]
    return torch.cat(logits), data.labels(split)


def regression(features: Tensor, labels: Tensor, classes: int, penalty: float = 1e-2) -> nn.Linear:
    """Logistic regression on standardised features, as a layer for the features themselves."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs, layer = ((features - mean) / std).double(), nn.Linear(features.shape[1], classes).double()
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(layer(inputs), labels) + penalty * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight /= std
        layer.bias -= layer.weight @ mean.double()
    return layer.float()


def network_of(name: str, data: ImageDataModule, out: Path, log: Log) -> nn.Module:
    """The ResNet-50 with a last layer for the data set, from `<out>/networks` or trained and saved there."""
    model = torchvision.models.resnet50()
    load_backbone(model, data_root("imagenet") / "resnet50.safetensors")
    model.fc = nn.Identity()
    model.eval()
    path = out / "networks" / f"{name}.safetensors"
    head = nn.Linear(2048, data.num_classes)
    if path.is_file():
        head.load_state_dict(load_file(path))
    else:
        head = regression(*logits_of(model, data, "train"), data.num_classes)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(head.state_dict(), path)
    model.fc = head
    return model


@dataclass
class RealStudy(Study):
    """One network with explained images that are not drawn.

    Attributes:
        samples: split and index of every explained image; its position in this list identifies it.
    """

    samples: Sequence[tuple[Any, int]] = field(default=())

    def explainers(self) -> dict[str, Explainer]:
        """The methods by name."""
        return {name: explainer_by_name(name, **options) for name, options in METHODS.items()}

    def batch(self, indices: list[int]) -> dict[str, Any]:
        """Images, labels, masks, and an engine that all metrics share."""
        samples = [self.data.dataset(split)[index] for split, index in (self.samples[k] for k in indices)]
        images, positions = torch.stack([sample["image"] for sample in samples]), torch.tensor(indices)
        return {
            "images": images,
            "labels": torch.tensor([sample["label"] for sample in samples]),
            "masks": torch.stack([sample["mask"] for sample in samples]),
            "indices": positions,
            "engine": PerturbationEngine.for_model(self.model, images, indices=positions),
        }


def explained(name: str, data: ImageDataModule, model: nn.Module, log: Log) -> list[tuple[Any, int]]:
    """Split and index of the held-out images that have a region and are recognised."""
    found: list[tuple[Any, int]] = []
    for split in HELD_OUT[name]:
        logits, labels = logits_of(model, data, split)
        right = logits.argmax(1) == labels
        log(f"{name}: accuracy {right.double().mean():.3f} of {len(labels)} {split} images")
        shares = [
            float(sample["mask"].double().mean()) for sample in map(data.dataset(split).__getitem__, range(len(right)))
        ]
        found += [(split, k) for k, share in enumerate(shares) if right[k] and 0 < share <= LARGEST_REGION]
    return found


def evenly(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    return [items[k * len(items) // count] for k in range(count)] if len(items) > count else items


def report(name: str, out: Path, draws: int) -> None:
    """Write and print the tables of a data set."""
    scored = read_scores(out, NETWORKS[name], TRUTHS[0])
    if scored is None:
        return
    rows = joined(scored, draws)
    save_rows(out / f"trust_{name}.csv", rows)
    averages = {t: np.nanmean(scored.of(t), 1) for t in TRUTHS}
    save_rows(
        out / f"methods_{name}.csv",
        [{"method": m, **{t: v[k] for t, v in averages.items()}} for k, m in enumerate(scored.methods)],
    )
    print(f"\n{name}: {scored.values.shape[2]} images, {len(scored.methods)} methods")
    for row in rows:
        cells = " ".join(f"{row[t]:5.2f} [{row[f'{t} low']:5.2f}, {row[f'{t} high']:5.2f}]" for t in TRUTHS)
        print(f"{row['metric']:20} {row['fill']:6} {cells} {row['forwards']:.0f}")


def joined(scored: Scored, draws: int) -> list[dict[str, Any]]:
    """A row per metric and fill with tau and interval to every one of `TRUTHS`, sorted by the mean of the taus."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for truth in TRUTHS:
        for row in table([scored], draws, truth, ()):
            key = {"metric": row["metric"], "fill": row["fill"], "forwards": row["forwards"]}
            numbers = {truth: row["tau"], f"{truth} low": row["low"], f"{truth} high": row["high"]}
            bare = {f"{truth} without baselines": row["without_baselines"]}
            rows.setdefault((row["metric"], row["fill"]), key).update(numbers | bare)
    return sorted(rows.values(), key=lambda row: -float(np.mean([row[t] for t in TRUTHS])))


def main() -> None:
    """Train the last layers, explain, score, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trust_real"))
    parser.add_argument("--images", type=int, default=12, help="explained images per data set")
    parser.add_argument("--steps", type=int, default=4, help="steps of insertion and deletion curves")
    parser.add_argument("--draws", type=int, default=500, help="resamples of the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    log, studies = Log(options.out / "log.txt"), []
    for name in options.only:
        data, begin = data_of(name), time.process_time()
        model = network_of(name, data, options.out, log)
        samples = evenly(explained(name, data, model, log), options.images)
        log(f"{name}: {len(samples)} images; {time.process_time() - begin:.0f} CPU s")
        studies.append(RealStudy(NETWORKS[name], data, model, options.out, log, samples=samples))
    for number, start in enumerate(range(0, options.images, BATCH)):
        for study in studies:
            study.measures_cost = number == 0
            study.run(number, list(range(len(study.samples)))[start : start + BATCH], groups(options.steps))
            report(study.network.family, options.out, options.draws)


if __name__ == "__main__":
    main()
