"""Small modules that between them every explainer works on, and the command lines that test them in every setting."""

from __future__ import annotations

import contextvars
import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import yaml
from every_explainer import SHORT
from small_detectors import TinySSD
from small_voc import annotation, write_voc, xml
from torch import Tensor, nn

from labn.explainers import EXPLAINERS
from labn.inference.modes import logits_of
from labn.metrics.comparisons import compare_values
from labn.modules import LABN
from labn.modules.base import CheckedModule, ClassificationModule
from labn.modules.losses import make_loss

HERE = Path(__file__).parent
METRICS = ["id", "pid8@official", "insertion8@random", "deletion16@stable", "fill_probability", "pctin", "pctin_prob10"]
METRICS += ["randomisation", "sparseness", "average_drop", "percent_increase", "adcc", "errors"]
METRICS += ["mass", "pointing", "rank", "auroc", "scene", "scene_top@shapley"]
METRICS += ["iou", "topk_localisation", "completeness", "sensitivity_n", "infidelity", "avg_sensitivity", "road"]
METRICS += ["random_logit", "pid16@error", "mufidelity", "irof", "mprt_layers", "smprt", "emprt"]
PROPAGATION = ("lrp", "c3lrp", "contrastive_lrp")
NETWORKS: dict[str, tuple[str, ...]] = {
    "lambda": tuple(name for name in EXPLAINERS if name not in ("crp", "legrad")),
    "residual": (*PROPAGATION, "gradcam", "rise", "random"),
    "transformer": ("legrad",),
    "detector": ("crp",),
}
# Every method is seen by metrics of its map, and every metric by some methods: all pairs would be ten times the work.
OF_MAPS = ["id", "pid8@official", "mass", "rank", "scene"]
SCORED: dict[str, list[str]] = {"lambda": OF_MAPS, "residual": METRICS, "transformer": OF_MAPS}
STEP = {"step": 128}
OPTIONS: dict[str, dict[str, Any]] = {
    "lambda": STEP,
    "residual": {**STEP, "percents": [10], "n_stages": 1, "mask_space": "pixel", "permutations": 4},
    "transformer": STEP,
}
TABLES = dict.fromkeys(NETWORKS, "scores.csv") | {"detector": "detection_scores.csv"}


class Residual(nn.Module):
    """A stem, a residual block, pooling and a linear layer: what relevance propagation has rules for."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        low = self.stem(x)
        return self.head(self.pool(self.relu(self.norm(self.conv(low)) + low)).flatten(1))


class UntrainedLABN(LABN):
    """A LABN that may be tested with the weights it was made with."""

    def on_test_start(self) -> None:
        """Nothing is refused."""


class ResidualModule(ClassificationModule):
    """A classifier that is only tested."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.network, self.criterion = Residual(num_classes), make_loss("ce", None, num_classes)

    def losses(self, batch: dict[str, Tensor], stage: str) -> tuple[dict[str, Tensor], Tensor]:
        logits = logits_of(self(batch["image"]))
        return {"loss": self.criterion(logits, batch["label"])}, logits


class TransformerModule(ResidualModule):
    """A vision transformer that is only tested."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": num_classes}
        self.network = timm.models.VisionTransformer(img_size=48, patch_size=12, **sizes)


class DetectorModule(CheckedModule):
    """A single-shot detector that is only tested."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.network = TinySSD(num_classes + 1)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: the callback asks the network itself."""


def write_configs(folder: Path, images: int = 6) -> None:
    """`lambda.yaml`, `residual.yaml`, `transformer.yaml` and `detector.yaml`, with `images` test images."""
    write_voc(folder / "voc")
    names = [f"image{k}" for k in range(images)]
    for seed, name in enumerate(names):
        annotation(folder / "voc", name).write_text(xml([("dog", (1 + seed, 1, 50, 30)), ("cat", (5, 5, 40, 38))]))
        source = folder / "voc" / "JPEGImages" / f"{'abd'[seed % 3]}.jpg"
        (folder / "voc" / "JPEGImages" / f"{name}.jpg").write_bytes(source.read_bytes())
    (folder / "voc" / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{name}\n" for name in names))
    for network in NETWORKS:
        (folder / f"{network}.yaml").write_text(yaml.safe_dump(config(network, folder, images)))


def config(network: str, folder: Path, images: int) -> dict[str, Any]:
    """The configuration of a network's test."""
    backbone = {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}
    models: dict[str, Any] = {
        "lambda": {
            "class_path": "every_network.UntrainedLABN",
            "init_args": {
                "backbone": "lambda_resnet",
                "split": 1,
                "gate_margin": 0.2,
                "network_options": {"backbone_options": backbone},
            },
        },
        "residual": {"class_path": "every_network.ResidualModule"},
        "transformer": {"class_path": "every_network.TransformerModule"},
        "detector": {"class_path": "every_network.DetectorModule"},
    }
    shared = {"batch_size": 3, "cache_dir": str(folder / "cache")}
    data: dict[str, Any] = {"image_size": 48, "n_train": 8, "n_val": 4, "n_test": images}
    voc = {"image_size": 32, "root": str(folder / "voc")}
    return {
        "imports": ["every_network"],
        "wandb": "disabled",
        "model": models[network],
        "data": {"class_path": "datamodules.VOC", "init_args": shared | voc}
        if network == "detector"
        else {"class_path": "datamodules.SyntheticFundus", "init_args": shared | data},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": callbacks(network, None),
        },
    }


def callbacks(network: str, chunk: int | None) -> list[dict[str, Any]]:
    """What explains and scores, with `chunk` inputs per forward wherever that can be said."""
    if network == "detector":
        crp = {"score_threshold": 0.0, "chunk_size": chunk}
        scores = {
            "class_path": "labn.metrics.detection.DetectionScores",
            "init_args": {"chunk_size": chunk, "fractions": [0, 0.1]},
        }
        return [
            {"class_path": "callbacks.DetectionCallback", "init_args": {"crp": crp, "top": 2, "scores": scores}},
        ]
    return [
        {
            "class_path": "callbacks.ExplanationCallback",
            "init_args": {"explainers": {name: explainer(name, chunk) for name in NETWORKS[network]}},
        },
        {
            "class_path": "callbacks.EvaluationCallback",
            "init_args": {
                "metrics": SCORED[network],
                "chunk_size": chunk,
                "metric_options": OPTIONS[network],
            },
        },
    ]


def explainer(name: str, chunk: int | None) -> dict[str, Any]:
    """The explainer as a configuration says it."""
    made = EXPLAINERS[name]
    arguments = SHORT.get(name, {})
    if chunk is not None and "chunk_size" in inspect.signature(made).parameters:
        arguments = {**arguments, "chunk_size": chunk}
    return {"class_path": f"{made.__module__}.{made.__qualname__}", "init_args": arguments}


def run_all(folder: Path, run: str, *more: str) -> None:
    """Test every network, with results in `<folder>/<run>/<network>/test`, in this process."""
    from cli import main

    # The intervals of thousands of pairs would take most of the time, and are functions of the scores alone.
    with patch("labn.results.tables.compare_values", partial(compare_values, n_resamples=2)):
        for network in NETWORKS:
            words = ["test", "--config", str(folder / f"{network}.yaml"), f"--run_dir={folder / run / network}", *more]
            contextvars.copy_context().run(main, words)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    os.environ["OMP_NUM_THREADS"] = "1"
    run_all(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:])
