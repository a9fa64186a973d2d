"""The pictures of the CRP paper for a trained detector, and their numbers.

    python tests/benchmarks/detection_study.py --ckpt runs/ssd_bccd/checkpoints/best.ckpt [--images 12]

Writes `layers.png` (likeness of the maps of two classes from the head down to the pixels, with and without contrast),
`what_if.png` (the maps of the detected and of another class), `explainers.png` (likeness of explainers, averaged over
detections) and `false.png` (the false detections with the highest scores), and prints the first and the third.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision.ops import box_iou

from datamodules import VOC
from labn.explainers import CRP
from labn.explainers.relevance.crp import Question
from labn.explainers.relevance.detection_trace import DetectionTrace
from labn.metrics.detection import runner_up, similarity_by_layer, without_contrast
from labn.metrics.functional.detection import map_similarity
from labn.modules import SSD
from labn.postprocess.overlay import displayable
from labn.report.figures import DetectionRow, detection_figure


class Study:
    """Collects what the pictures need, image by image."""

    def __init__(self, score: float, top: int) -> None:
        self.crp, self.top = CRP(score_threshold=score), top
        self.plain = without_contrast(self.crp)
        self.layers: dict[str, list[dict[str, float]]] = {"crp": [], "lrp": []}
        self.matrices: list[np.ndarray] = []
        self.names: list[str] = []
        self.what_if: list[tuple[np.ndarray, DetectionRow]] = []
        self.false: list[tuple[float, np.ndarray, DetectionRow]] = []

    def add(self, detector: torch.nn.Module, sample: dict, shown: np.ndarray, classes: list[str]) -> None:
        trace = self.crp.trace(detector, sample["image"])
        found = trace.detections(self.crp.thresholds).best(self.top)
        overlaps = box_iou(found.boxes, sample["boxes"]) * (found.labels[:, None] == sample["labels"][None] + 1)
        for n, (prior, label) in enumerate(zip(found.priors.tolist(), found.labels.tolist())):
            other = runner_up(trace, prior, label)
            maps = self.maps(trace, prior, label, other)
            self.names = list(maps)
            heats = torch.stack(list(maps.values()))
            self.matrices.append(np.array([map_similarity(heat.expand_as(heats), heats).tolist() for heat in heats]))
            title = f"{classes[label]} {float(found.scores[n]):.2f}, source {trace.layout.unit(prior).source}"
            row = DetectionRow(title, found.boxes[n].tolist(), {k: v.numpy() for k, v in maps.items()})
            if n == 0:
                for name, method in (("crp", self.crp), ("lrp", self.plain)):
                    self.layers[name].append(similarity_by_layer(method, trace, prior, (label, other)))
                self.what_if.append((shown, row))
            if float(overlaps[n].max() if overlaps.shape[1] else 0) < 0.5:
                self.false.append((float(found.scores[n]), shown, row))

    def maps(self, trace: DetectionTrace, prior: int, label: int, other: int) -> dict[str, torch.Tensor]:
        """CRP and plain maps of both classes, and the four coordinates."""
        both = [Question(prior, "class", k) for k in (label, other)]
        contrast = self.crp.ask(trace, [*both, *(Question(prior, t) for t in ("cx", "cy", "w", "h"))]).maps
        plain = self.plain.ask(trace, both).maps
        names = ["crp", "crp, what if", "lrp", "lrp, what if", "cx", "cy", "w", "h"]
        return dict(zip(names, [*contrast[:2], *plain, *contrast[2:]]))


def layers_figure(layers: dict[str, list[dict[str, float]]]) -> Figure:
    """Mean likeness by number of convolutions below the head; detections of other sources have other depths."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for name, found in layers.items():
        positions = np.linspace(0, 1, 11)
        curves = [np.interp(positions, np.linspace(0, 1, len(f)), list(f.values())) for f in found]
        axis.plot(positions, np.mean(curves, 0), marker="o", label=name)
        print(f"{name}: head {np.mean([c[0] for c in curves]):.3f}, pixels {np.mean([c[-1] for c in curves]):.3f}")
    axis.set_xlabel("from the head (0) to the pixels (1)")
    axis.set_ylabel("cosine of two classes' relevance")
    axis.legend()
    return figure


def matrix_figure(matrix: np.ndarray, names: list[str]) -> Figure:
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axis = figure.subplots()
    figure.colorbar(axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1), ax=axis)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    for row, name in zip(matrix, names):
        print(f"{name:14}" + " ".join(f"{value:6.2f}" for value in row))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", default="bccd")
    parser.add_argument("--classes", nargs="+", default=["RBC", "WBC", "Platelets"])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--score", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    module = SSD.load_from_checkpoint(arguments.ckpt, map_location="cpu").eval()
    data = VOC(name=arguments.data, classes=arguments.classes)
    dataset, study = data.dataset("test"), Study(arguments.score, arguments.top)
    for index in np.linspace(0, len(dataset) - 1, arguments.images).round().astype(int).tolist():
        sample = dataset[index]
        shown = displayable(sample["image"], data.mean, data.std)
        study.add(module.network, sample, shown, ["background", *data.class_names])
    arguments.out.mkdir(parents=True, exist_ok=True)
    layers_figure(study.layers).savefig(arguments.out / "layers.png", dpi=110)
    matrix_figure(np.mean(study.matrices, 0), study.names).savefig(arguments.out / "explainers.png", dpi=110)
    print(f"{len(study.matrices)} detections, {len(study.false)} of them false")
    for name, chosen in (
        ("what_if", study.what_if[:3]),
        ("false", [f[1:] for f in sorted(study.false, key=lambda f: -f[0])[:3]]),
    ):
        for number, (shown, row) in enumerate(chosen):
            detection_figure(shown, [row]).savefig(arguments.out / f"{name}{number}.png", dpi=90)


if __name__ == "__main__":
    main()
