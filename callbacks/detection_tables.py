"""What the detection callback writes: rows, tables and pictures."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torchvision.ops import box_iou

from labn.detection_plots import DetectionRow, detection_figure
from labn.explainers.detection import DetectionPassage
from labn.metrics.statistics import bootstrap_mean, paired_difference
from labn.models.detectors import Detections
from labn.results import PAIRED, SUMMARY

DETECTIONS = (
    "split",
    "index",
    "name",
    "detection",
    "class",
    "score",
    "x1",
    "y1",
    "x2",
    "y2",
    "prior",
    "source",
    "overlap",
)
SCORES = ("split", "index", "name", "detection", "explainer", "metric", "value")


def detection_rows(
    found: Detections, passage: DetectionPassage, classes: Sequence[str], truth: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """One row of `detections.csv` per detection; `source` counts the source maps from 0.

    `overlap` is the largest intersection over union with an object of the same class, 0 without any: a false detection
    has a small one. `truth` holds boxes (m, 4) in pixels and object classes (m,), 0 the first.
    """
    boxes, labels = (part.to(found.boxes.device) for part in truth)
    same = found.labels[:, None] == labels[None] + 1
    overlaps = torch.cat([box_iou(found.boxes, boxes) * same, found.boxes.new_zeros(len(found), 1)], 1).amax(1)
    columns = (
        found.boxes.tolist(),
        found.scores.tolist(),
        found.labels.tolist(),
        found.priors.tolist(),
        overlaps.tolist(),
    )
    return [
        {
            "detection": number,
            "class": classes[label],
            "score": score,
            **dict(zip(("x1", "y1", "x2", "y2"), box)),
            "prior": prior,
            "source": passage.layout.unit(prior).source,
            "overlap": overlap,
        }
        for number, (box, score, label, prior, overlap) in enumerate(zip(*columns))
    ]


def draw(image: Any, rows: Sequence[dict[str, Any]], maps: Tensor, tasks: Sequence[str], title: str) -> bytes:
    """The picture of one image as PNG; `maps` (n, tasks, H, W) belong to the rows."""
    lines = [
        DetectionRow(
            f"{row['class']} {row['score']:.2f}, source map {row['source']}",
            [row[edge] for edge in ("x1", "y1", "x2", "y2")],
            {task: heat.cpu().numpy() for task, heat in zip(tasks, heats)},
        )
        for row, heats in zip(rows, maps)
    ]
    buffer = io.BytesIO()
    detection_figure(image, lines, title if lines else f"{title}: no detection").savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def packed(maps: Tensor, found: Detections) -> bytes:
    """Maps and detections of one image as a safetensors file."""
    tensors = {"maps": maps, **vars(found)}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def summarise(scores: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean per explainer and metric over detections, with the interval of resampled images."""
    columns: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in scores:
        columns.setdefault((row["explainer"], row["metric"]), []).append((row["index"], row["value"]))
    rows = []
    for (explainer, metric), pairs in columns.items():
        interval = bootstrap_mean([value for _, value in pairs], groups=[index for index, _ in pairs])
        figures = (explainer, metric, interval.mean, interval.low, interval.high, interval.n)
        rows.append(dict(zip(SUMMARY, figures)))
    return rows


def pair(scores: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean of a - b over detections for every two explainers of a metric, with the interval of resampled images.

    `random` is always b.
    """
    columns: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    for row in scores:
        column = columns.setdefault(row["metric"], {}).setdefault(row["explainer"], {})
        column[row["index"], row["detection"]] = row["value"]
    rows = []
    for metric, found in columns.items():
        keys = {key: number for number, key in enumerate(sorted(set().union(*found.values())))}
        groups = {number: index for (index, _), number in keys.items()}
        for a, b in itertools.combinations(sorted(found, key=lambda name: name == "random"), 2):
            (ones, first), (twos, second) = (([keys[k] for k in found[n]], list(found[n].values())) for n in (a, b))
            interval = paired_difference(ones, first, twos, second, groups=groups)
            figures = (a, b, metric, interval.mean, interval.low, interval.high, interval.n)
            rows.append(dict(zip(PAIRED, figures)))
    return rows


def as_csv(header: Sequence[str], rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
