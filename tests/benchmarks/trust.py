"""Which metric ranks explanations as the truth does: Kendall's tau between every metric and the metric `scene`.

    python tests/benchmarks/trust.py --out runs/trust [--images 12] [--steps 8] [--threads 1] [--networks ...]

Trains small networks on `SyntheticFundus` and `SyntheticRelations` (attention branch networks and plain ones, from
separate seeds), explains their test images with every method, scores the maps with every metric and fill, and compares
the ranking of the methods by each metric with the ranking by `scene`, whose truth comes from drawing the scenes again.
Networks (`<out>/networks/`) and scores of every batch (`<out>/scores/`) are saved; a second call goes on where the
first one ended, and `--table` prints the tables of what is there. Progress goes to `<out>/log.txt`.

Written to `<out>`: `trust.csv`, a row per metric and fill with tau over all methods, its 95 % interval over resampled
networks and images, tau without the baselines, tau of single images, and the cost in forwards per map; `ties.csv`, the
share of the pairs of methods that another treatment of ties turns round; `methods.csv`, the mean of `scene` per method.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from datamodules import ImageDataModule, SyntheticFundus, SyntheticRelations
from labn.explainers import Explainer, explainer_by_name
from labn.metrics import ScoredBatch, describe_value, metric_by_name
from labn.metrics.base import SampleMetric
from labn.modules import LABN
from labn.modules.guidance import SaliencyGuidance
from labn.perturbation.engine import PerturbationEngine

ROOT = Path(__file__).parents[2]
BATCH = 4
TRUTH = "scene"


class PlainNet(nn.Module):
    """Three residual blocks on a stem of stride 2, mean pooling and a linear layer; 8 x 8 feature maps of 64 px."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.features = nn.Sequential(*stem, *(self._block(*widths) for widths in ((16, 24), (24, 48), (48, 48))))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(48, num_classes)

    def _block(self, before: int, after: int) -> nn.Module:
        if before == after:
            return BasicBlock(before, after)
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))
        return BasicBlock(before, after, 2, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.pool(self.features(x)).flatten(1))


@dataclass(frozen=True)
class Trained:
    """A network of the study.

    Attributes:
        family: `fundus` or `relations`.
        kind: `labn` or `plain`.
        seed: seed of weights and of the order of the training images.
    """

    family: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Name in files."""
        return f"{self.family}-{self.kind}-{self.seed}"


NETWORKS = [
    *(Trained("fundus", "labn", seed) for seed in (0, 1)),
    *(Trained("fundus", "plain", seed) for seed in (0, 1, 2)),
    *(Trained("relations", "plain", seed) for seed in (0, 1)),
]


def data_of(family: str) -> ImageDataModule:
    """The data of a family; its test images are the explained ones."""
    made: dict[str, Callable[[], ImageDataModule]] = {
        "fundus": lambda: SyntheticFundus(n_train=1600, n_val=200, n_test=200),
        "relations": lambda: SyntheticRelations(n_train=3200, n_val=200, n_test=200),
    }
    data = made[family]()
    data.setup("fit")
    data.setup("test")
    return data


def train(network: Trained, data: ImageDataModule, epochs: dict[str, int]) -> nn.Module:
    """Train a network from its seed."""
    pl.seed_everything(network.seed, verbose=False)
    data.seed = network.seed
    return (train_labn if network.kind == "labn" else train_plain)(data, epochs[network.family])


def labn_arguments() -> dict[str, Any]:
    """The arguments of the quickstart's network, at half its width."""
    arguments = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["model"]["init_args"]
    arguments["network_options"]["backbone_options"] = {"layers": [1, 1, 1], "width": 8, "stem_width": 16, "r": 5}
    return arguments


def train_labn(data: ImageDataModule, epochs: int) -> nn.Module:
    """The quickstart's network at half its width, with its guidance."""
    arguments = labn_arguments()
    guidance = SaliencyGuidance(**arguments.pop("guidance"))
    module = LABN(num_classes=data.num_classes, guidance=guidance, **arguments)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    trainer.fit(module, datamodule=data)
    return module.network.eval()


def train_plain(data: ImageDataModule, epochs: int) -> nn.Module:
    """AdamW with one cycle of the learning rate."""
    model = PlainNet(data.num_classes)
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * len(loader))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            loss = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def load_or_train(network: Trained, data: ImageDataModule, options: argparse.Namespace, log: Log) -> nn.Module:
    """The network from `<out>/networks`, else trained and saved there."""
    path = options.out / "networks" / f"{network.name}.safetensors"
    if not path.is_file():
        start = time.process_time()
        model = train(network, data, EPOCHS)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: values.contiguous() for name, values in model.state_dict().items()}, path)
        log(f"{network.name}: trained in {time.process_time() - start:.0f} CPU s")
    model = untrained(network, data)
    model.load_state_dict(load_file(path))
    return model.eval()


def untrained(network: Trained, data: ImageDataModule) -> nn.Module:
    """The network of a kind with random weights."""
    if network.kind == "plain":
        return PlainNet(data.num_classes)
    return LABN(num_classes=data.num_classes, **{**labn_arguments(), "guidance": None}).network


EPOCHS = {"fundus": 5, "relations": 20}


class Log:
    """Lines with the time, printed and appended to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(f"{line}\n")


def explainers(network: Trained, data: ImageDataModule) -> dict[str, Explainer]:
    """The methods by name; those of the attention branch on networks that have one."""
    black_white = {"mean": data.mean, "std": data.std, "n_steps": 8}
    few: dict[str, dict[str, Any]] = {
        "rise": {"n_masks": 256, "sampler": "orthogonal"},
        "occlusion": {"window": 8, "stride": 4},
        "smoothgradcam++": {"n_samples": 8},
        "integrated_gradients": {"n_steps": 16},
        "integrated_gradients_blur": {"n_steps": 16},
        "integrated_gradients_bw": black_white,
        "expected_gradients": {"n_samples": 16},
        "smoothgrad": {"n_samples": 16},
    }
    own = ("labn", "-labn", "lambda") if network.kind == "labn" else ()
    return {name: explainer_by_name(name, **few.get(name, {})) for name in (*METHODS, *own)}


METHODS = (
    "cam", "gradcam", "-gradcam", "gradcam++", "smoothgradcam++", "xgradcam", "layercam", "hirescam", "scorecam",
    "ablationcam", "amg", "gradient", "gradxinput", "integrated_gradients", "integrated_gradients_blur",
    "integrated_gradients_bw", "expected_gradients", "smoothgrad", "guided_backprop", "deconvnet", "occlusion", "rise",
    "lrp", "c3lrp", "contrastive_lrp", "random", "constant", "sobel",
)  # fmt: skip
"""Methods of every network; FinerCAM is Grad-CAM of the difference of two logits where there are two classes."""

BASELINES = ("random", "constant", "sobel", "-gradcam", "-labn")

FILLS = ("black", "mean", "blur", "bias", "uniform")


@dataclass(frozen=True)
class Group:
    """Metrics that are scored with the same settings.

    Attributes:
        fill: what removed pixels show; empty where nothing is removed.
        names: names of metrics.
        settings: further settings of the metrics.
        suffix: appended to the names of the values.
    """

    fill: str
    names: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    suffix: str = ""

    @property
    def key(self) -> str:
        """Identity in saved scores."""
        return json.dumps([self.fill, self.names, self.settings, self.suffix])


def groups(steps: int) -> list[Group]:
    """Everything that is scored, the truth first."""
    patches, ties = ("id", "pid4", "pid16"), ("official", "stable", "random", "threshold")
    shapley = Group("", ("scene@shapley",), (("permutations", 16),))
    mean = Group("", ("scene",), (("opinion", "mean"),), " (mean)")
    found = [
        Group("", ("scene",)),
        mean,
        shapley,
        Group("", ("mass", "rank", "pointing", "auroc", "iou", "topk_localisation", "sparseness")),
    ]
    for fill in FILLS:
        in_steps = (("n_steps", steps),)
        found.append(Group(fill, patches, in_steps))
        found.append(Group(fill, patches, (*in_steps, ("probability", "logit")), " (logit)"))
        found.append(Group(fill, ("pctin",)))
        sets = (("draws", 16), ("sizes", (0.1, 0.3, 0.5)))
        found.append(Group(fill, ("sensitivity_n", "infidelity"), sets))
        found.append(Group(fill, ("completeness",)))
    found.append(Group("bias", tuple(f"{n}@{t}" for n in patches for t in ties), (("n_steps", steps),)))
    found.append(Group("", ("average_drop", "percent_increase", "adcc")))
    found.append(Group("", ("road",)))
    found.append(Group("", ("randomisation", "random_logit")))
    found.append(Group("", ("max_sensitivity",), (("draws", 1),)))
    return found


def built(group: Group, data: ImageDataModule, bias: Tensor) -> dict[str, SampleMetric]:
    """The metrics of a group, with the data's normalisation."""
    settings = {"mean": data.mean, "std": data.std, "bias": bias, **dict(group.settings)}
    if group.fill:
        settings["fill"] = group.fill
    return {name: metric_by_name(name, **settings) for name in group.names}


@dataclass
class Study:
    """One network with its explained images."""

    network: Trained
    data: ImageDataModule
    model: nn.Module
    out: Path
    log: Log
    measures_cost: bool = False

    def run(self, number: int, indices: list[int], plan: list[Group]) -> None:
        """Explain and score one batch of images, as far as that has not been done."""
        path = self.out / "scores" / f"{self.network.name}-{number}.json"
        scores = json.loads(path.read_text()) if path.is_file() else {}
        missing = [group for group in plan if group.key not in scores]
        if not missing or not indices:
            return
        batch, bias, begin = self.batch(indices), self.data.bias_image(), time.process_time()
        maps = self.maps(batch, number)
        self.log(f"{self.network.name}: batch {number}, {len(maps)} maps, {time.process_time() - begin:.0f} CPU s")
        for group in missing:
            scores[group.key] = self.score(batch, maps, built(group, self.data, bias), group)
            write(path, json.dumps(scores))
        spent = time.process_time() - begin
        self.log(f"{self.network.name}: batch {number}, {len(missing)} groups, {spent:.0f} CPU s")

    def explainers(self) -> dict[str, Explainer]:
        """The methods by name."""
        return explainers(self.network, self.data)

    def batch(self, indices: list[int]) -> dict[str, Any]:
        """Images, labels, masks, scenes, and an engine that all metrics share."""
        samples = [self.data.dataset("test")[index] for index in indices]
        images = torch.stack([sample["image"] for sample in samples])
        positions = torch.tensor(indices)
        return {
            "images": images,
            "labels": torch.tensor([sample["label"] for sample in samples]),
            "masks": torch.stack([sample["mask"] for sample in samples]),
            "indices": positions,
            "scenes": [self.data.scene("test", index) for index in indices],
            "engine": PerturbationEngine.for_model(self.model, images, indices=positions),
        }

    def maps(self, batch: dict[str, Any], number: int) -> dict[str, Tensor]:
        """The maps of every method, from disk where they are there."""
        path = self.out / "maps" / f"{self.network.name}-{number}.safetensors"
        maps = load_file(path) if path.is_file() else {}
        missing = [n for n in self.explainers() if n not in maps]
        for name in missing:
            explainer = self.explainers()[name]
            maps[name] = explainer(self.model, batch["images"], batch["labels"], batch["indices"]).contiguous()
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(maps, path)
        return maps

    def score(
        self, batch: dict[str, Any], maps: dict[str, Tensor], metrics: dict[str, SampleMetric], group: Group
    ) -> dict[str, Any]:
        """Value -> method -> scores of the batch, and the cost of one map."""
        values: dict[str, dict[str, list[float]]] = {}
        for method, heat in maps.items():
            scored = self.scored(batch, method, heat, batch["engine"])
            for metric in metrics.values():
                for name, column in metric.score_batch(scored).values.items():
                    values.setdefault(name + group.suffix, {})[method] = column.tolist()
        measured = self.costs(batch, maps, metrics) if self.measures_cost else {}
        costs = {name + group.suffix: cost for name, cost in measured.items()}
        return {"values": values, "fill": group.fill, "costs": costs}

    def scored(self, batch: dict[str, Any], method: str, heat: Tensor, engine: Any) -> ScoredBatch:
        """Input of the metrics."""
        return ScoredBatch(
            self.model, batch["images"], heat, batch["labels"], batch["indices"], masks=batch["masks"],
            explainer=self.explainers()[method], cache=engine, scenes=batch.get("scenes"),
        )  # fmt: skip

    def costs(
        self, batch: dict[str, Any], maps: dict[str, Tensor], metrics: dict[str, SampleMetric]
    ) -> dict[str, list[float]]:
        """Value -> forwards and explanations per map, of every metric alone."""
        costs = {}
        for metric in metrics.values():
            calls = [0]

            def again(*arguments: Any, calls: list[int] = calls) -> Tensor:
                calls[0] += 1
                return arguments[1].mean(1)

            engine = PerturbationEngine.for_model(self.model, batch["images"], indices=batch["indices"])
            scored = self.scored(batch, "random", maps["random"], engine)
            object.__setattr__(scored, "explainer", again)
            metric.score_batch(scored)
            costs |= {name: [engine.forwards / len(batch["images"]), calls[0]] for name in metric.names}
        return costs


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def explained(network: Trained, data: ImageDataModule, model: nn.Module, count: int) -> list[int]:
    """The first test images that the network gets right; of the fundus images those with lesions, which have a mask."""
    batches = data.test_dataloader()
    with torch.no_grad():
        outputs = [model(batch["image"]) for batch in batches]
    predicted = torch.cat([getattr(output, "logits", output) for output in outputs]).argmax(1)
    labels = data.labels("test")
    right = (predicted == labels) & ((labels > 0) | (network.family != "fundus"))
    return right.nonzero().flatten().tolist()[:count]


@dataclass
class Scored:
    """Scores of one network: arrays (values, methods, images), NaN where a metric leaves an image out."""

    network: Trained
    columns: list[tuple[str, str]]
    methods: list[str]
    values: np.ndarray
    costs: dict[tuple[str, str], list[float]]

    def of(self, name: str) -> np.ndarray:
        """The (methods, images) of a value without a fill."""
        return self.values[self.columns.index((name, ""))]


def read_scores(out: Path, network: Trained, truth: str = TRUTH) -> Scored | None:
    """All saved scores of a network; images without a value of `truth` are left out."""
    files = sorted((out / "scores").glob(f"{network.name}-*.json"), key=lambda p: int(p.stem.rpartition("-")[2]))
    found: dict[tuple[str, str], list[dict[str, list[float]]]] = {}
    costs: dict[tuple[str, str], list[float]] = {}
    contents = [json.loads(file.read_text()) for file in files]
    # A batch that is being scored lacks groups that the first one has.
    complete = [groups for groups in contents if groups.keys() >= contents[0].keys()]
    for content in complete:
        for group in content.values():
            for name, by_method in group["values"].items():
                if name.startswith("fill_probability"):
                    continue  # the same for every map
                found.setdefault((name, group["fill"]), []).append(by_method)
            costs |= {(name, group["fill"]): cost for name, cost in group["costs"].items()}
    columns = [column for column, batches in found.items() if len(batches) == len(complete)]
    if not columns:
        return None
    methods = list(found[columns[0]][0])
    table = [[[v for batch in found[column] for v in batch[method]] for method in methods] for column in columns]
    values = np.array(table, dtype=float)
    signs = {"high": 1, "low": -1, "": 1}
    values *= np.array([signs[describe_value(name.split(" ")[0]).better] for name, _ in columns])[:, None, None]
    scored = Scored(network, columns, methods, values, costs)
    scored.values = values[:, :, ~np.isnan(scored.of(truth)).any(0)]
    return scored


def kendall(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kendall's tau-b along the last axis; NaN where one side is constant."""
    i, j = np.triu_indices(first.shape[-1], 1)
    a, b = (np.sign(v[..., i] - v[..., j]) for v in (first, second))
    scale = np.sqrt((a != 0).sum(-1) * (b != 0).sum(-1).astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(a * b, -1) / scale


def means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means (draws, ..., methods) over images drawn `counts` (draws, images) times, without NaN."""
    known = ~np.isnan(values)
    total = np.einsum("vmi,di->dvm", np.where(known, values, 0), counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.einsum("vmi,di->dvm", known.astype(float), counts)


def taus(scored: Scored, truth: str, counts: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Kendall's tau (draws, values) between the rankings of the methods `keep` by every value and by the truth."""
    averages = means(scored.values[:, keep], counts)
    return kendall(averages, averages[:, [scored.columns.index((truth, ""))]])


def sample_taus(scored: Scored, truth: str) -> np.ndarray:
    """Mean over images of tau (values,) between the rankings of the methods on a single image."""
    values = np.swapaxes(scored.values, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value may rank no image
        return np.nanmean(kendall(values, scored.of(truth).T[None]), 1)


OTHERS = ("scene (mean)", "scene_logit", "scene@shapley")
"""Other readings of the truth."""


def table(
    found: list[Scored], draws: int, truth: str = TRUTH, others: tuple[str, ...] = OTHERS
) -> list[dict[str, Any]]:
    """Rows of `trust.csv`, sorted by tau."""
    rng = np.random.default_rng(0)
    columns = [c for c in found[0].columns if all(c in other.columns for other in found)]
    plain, resampled, bare, single = [], [], [], []
    other: dict[str, list[np.ndarray]] = {name: [] for name in others}
    for scored in found:
        order = [scored.columns.index(c) for c in columns]
        images = scored.values.shape[2]
        once, every = np.ones((1, images)), np.ones(len(scored.methods), dtype=bool)
        counts = rng.multinomial(images, np.full(images, 1 / images), draws).astype(float)
        informed = np.array([m not in BASELINES for m in scored.methods])
        plain.append(taus(scored, truth, once, every)[0, order])
        resampled.append(taus(scored, truth, counts, every)[:, order])
        bare.append(taus(scored, truth, once, informed)[0, order])
        single.append(sample_taus(scored, truth)[order])
        for name, values in other.items():
            values.append(taus(scored, name, once, every)[0, order])
    picks = rng.integers(len(found), size=(draws, len(found)))
    # Another resample of the images for every pick, also where one network is drawn several times.
    turned = (np.arange(draws)[:, None] + 37 * np.arange(len(found))) % draws
    spread = np.nanmean(np.stack(resampled)[picks, turned], 1)
    low, high = np.nanpercentile(spread, [2.5, 97.5], axis=0)
    by_kind = {
        kind: np.nanmean([t for t, s in zip(plain, found) if f"{s.network.family} {s.network.kind}" == kind], 0)
        for kind in dict.fromkeys(f"{s.network.family} {s.network.kind}" for s in found)
    }
    rows = []
    for k, (name, fill) in enumerate(columns):
        cost = next((s.costs[name, fill] for s in found if (name, fill) in s.costs), [np.nan, np.nan])
        row = {"metric": name, "fill": fill, "tau": np.nanmean(plain, 0)[k], "low": low[k], "high": high[k]}
        row |= {"without_baselines": np.nanmean(bare, 0)[k], "single_images": np.nanmean(single, 0)[k]}
        row |= {f"to_{name}": np.nanmean(values, 0)[k] for name, values in other.items()}
        row |= {kind: values[k] for kind, values in by_kind.items()}
        rows.append({**row, "forwards": cost[0], "explanations": cost[1]})
    return sorted(rows, key=lambda row: -np.nan_to_num(row["tau"], nan=-2))


def tie_rows(found: list[Scored]) -> list[dict[str, Any]]:
    """Share of the pairs of methods that another treatment of ties orders differently, mean over networks."""
    rows = []
    for name, fill in found[0].columns:
        base, at, rule = name.partition("@")
        if not at or (base, fill) not in found[0].columns or base.startswith("scene"):
            continue
        changed, best = [], []
        for scored in found:
            once = np.ones((1, scored.values.shape[2]))
            pair = [scored.columns.index((n, fill)) for n in (base, name)]
            first, second = means(scored.values[pair], once)[0]
            i, j = np.triu_indices(len(first), 1)
            changed.append((np.sign(first[i] - first[j]) != np.sign(second[i] - second[j])).mean())
            best.append(scored.methods[int(second.argmax())])
        rows.append({"metric": base, "fill": fill, "ties": rule, "changed": np.mean(changed), "best": " ".join(best)})
    return rows


def method_rows(found: list[Scored]) -> list[dict[str, Any]]:
    """Mean of the truth per method and kind of network."""
    kinds = list(dict.fromkeys(f"{s.network.family} {s.network.kind}" for s in found))
    rows = []
    for method in dict.fromkeys(m for s in found for m in s.methods):
        row: dict[str, Any] = {"method": method}
        for kind in kinds:
            own = [s for s in found if f"{s.network.family} {s.network.kind}" == kind and method in s.methods]
            for name in ("scene", "scene_top"):
                values = [np.nanmean(s.of(name)[s.methods.index(method)]) for s in own]
                row[f"{kind} {name}"] = np.mean(values) if values else ""
        rows.append(row)
    return rows


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV file with three decimals."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def report(out: Path, draws: int) -> None:
    """Write the tables of all saved scores and print the first."""
    found = [scored for network in NETWORKS if (scored := read_scores(out, network)) is not None]
    rows = table(found, draws)
    save_rows(out / "trust.csv", rows)
    save_rows(out / "ties.csv", tie_rows(found))
    save_rows(out / "methods.csv", method_rows(found))
    images = " ".join(f"{s.network.name}:{s.values.shape[2]}" for s in found)
    print(f"\n{len(found)} networks, images {images}, up to {max(len(s.methods) for s in found)} methods")
    for row in rows:
        numbers = f"{row['tau']:.2f} [{row['low']:.2f}, {row['high']:.2f}] {row['without_baselines']:.2f}"
        print(f"{row['metric']:28} {row['fill']:10} {numbers} {row['single_images']:.2f} {row['forwards']:.0f}")


def main() -> None:
    """Train, explain, score, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trust"))
    parser.add_argument("--images", type=int, default=12, help="explained images per network")
    parser.add_argument("--steps", type=int, default=8, help="steps of insertion and deletion curves")
    parser.add_argument("--draws", type=int, default=500, help="resamples of networks and images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="*", help="names such as fundus-plain-0; default: all seven")
    parser.add_argument("--skip", nargs="*", default=[], help="names of metrics that are left out, such as road")
    parser.add_argument("--table", action="store_true", help="only the tables of what has been scored")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    log = Log(options.out / "log.txt")
    known = {network.name: network for network in NETWORKS}
    chosen = [] if options.table else [known[name] for name in options.networks or known]
    families = {family: data_of(family) for family in dict.fromkeys(network.family for network in chosen)}
    studies = []
    for network in chosen:
        data = families[network.family]
        model = load_or_train(network, data, options, log)
        indices = explained(network, data, model, options.images)
        # The number of forwards is the same on every network.
        studies.append((Study(network, data, model, options.out, log, network == chosen[0]), indices))
        log(f"{network.name}: {len(indices)} images")
    # Batch by batch over all networks, so that a study that is stopped has images of every network.
    for number, start in enumerate(range(0, options.images, BATCH)):
        for study, indices in studies:
            plan = [group for group in groups(options.steps) if not set(group.names) & set(options.skip)]
            study.run(number, indices[start : start + BATCH], plan)
        report(options.out, options.draws)
    report(options.out, options.draws)


if __name__ == "__main__":
    main()
