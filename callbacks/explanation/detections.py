"""Explain the best detections of every image with CRP: up to five maps per detection, pictures, and scores."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from torch import Tensor
from torchvision.ops import box_iou

from callbacks.explanation.lifecycle import Schedule, StageCallback, check_counts, stage_folder
from callbacks.explanation.session import identity_of, network_of
from callbacks.logging.results import capped, for_each_tracker
from callbacks.logging.trackers import trackers_of
from labn.errors import InputError
from labn.explainers.relevance.crp import CRP, TASKS, Question, Task
from labn.explainers.relevance.detection_trace import DetectionTrace
from labn.io.atomic import write_atomically
from labn.io.table_cells import csv_bytes
from labn.metrics.comparisons import Value, compare_values
from labn.metrics.detection import DetectionScores, check_contrast
from labn.metrics.statistics import bootstrap_mean
from labn.models.detectors import Detections
from labn.postprocess.overlay import displayable, png_bytes
from labn.report import render
from labn.report.detections import detection_card, detection_report
from labn.report.figures import DetectionRow, detection_figure
from labn.results.shard_index import readable_name
from labn.results.store import ResultStore
from labn.results.tables import PAIRED, SUMMARY


class DetectionCallback(StageCallback):
    """Explain the best detections of every image by contrastive relevance propagation (CRP) at validation and test end.

    In `<run_dir>/<stage>/` every explained image gets `detections/<index>.safetensors` (`maps` (n, tasks, H, W),
    `boxes`, `scores`, `labels`, `priors`) and `overlays/<index>-<name>.png`. The stage gets `detections.csv`,
    `report.html` and, with `scores`, `detection_scores.csv`, `detection_summary.csv` (means over detections with 95 %
    intervals, whole images resampled) and `detection_paired.csv` (differences between two explainers). An image
    without detections has a picture but no row. Pictures are also logged to Weights & Biases.

    Everything is computed anew in every run. Results of the same weights and data are replaced; results of other
    weights or data are moved aside (`test.old-1`).

    Args:
        crp: the explainer, whose thresholds define what a detection is; None: defaults with a score threshold of 0.3.
        tasks: outputs that are explained per detection: `class`, `cx`, `cy`, `w`, `h`.
        top: number of detections explained per image, those with the highest scores.
        val_images: images explained at validation end while fitting, evenly spaced over the split.
        test_images: images explained at test end and by `validate`; None explains all.
        every_n_epochs: explain every n-th validation epoch while fitting; 0 never does.
        scores: metrics of the maps at test end; they need a `crp` with contrast. None: no scores.

    Raises:
        InputError: a task is unknown, `scores` is given for a `crp` without contrast, a number is negative, or
            `test_images` is 0.
    """

    def __init__(
        self,
        crp: CRP | None = None,
        tasks: Sequence[Task] = TASKS,
        top: int = 3,
        val_images: int = 4,
        test_images: int | None = None,
        every_n_epochs: int = 1,
        scores: DetectionScores | None = None,
    ) -> None:
        if unknown := set(tasks) - set(TASKS):
            raise InputError(f"tasks has {unknown.pop()!r}; it must be some of {', '.join(TASKS)}.")
        check_counts(top=top)
        self.schedule = Schedule(val_images, test_images, every_n_epochs)
        self.crp = crp or CRP(score_threshold=0.3)
        if scores is not None:
            check_contrast(self.crp)
        self.tasks, self.top = tuple(tasks), top
        self.scores = scores
        self._folder: Path | None = None
        self._chosen: set[int] = set()

    @property
    def folder(self) -> Path | None:
        """Results folder of the current stage; None before the first stage."""
        return self._folder

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Choose the results folder and the images; a collective."""
        self._folder = stage_folder(trainer, pl_module, split)
        size = len(trainer.datamodule.source(split))  # type: ignore[attr-defined]
        self._chosen = set(self.schedule.samples(trainer, size))
        identity = identity_of(trainer, network_of(pl_module), split)
        if trainer.is_global_zero:
            ResultStore(self._folder).prepare(identity)
            remove_results(self._folder)
        trainer.strategy.barrier("labn-detections-opened")

    def work(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, position: tuple[Any, ...]) -> None:
        """Explain the chosen images of a batch."""
        network = network_of(pl_module)
        for row, index in enumerate(batch["index"].tolist()):
            if index in self._chosen:
                truth = (batch["boxes"][row], batch["labels"][row])
                self._image(trainer, network, batch["image"][row].float(), truth, index, position[0])

    def publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Write the tables and the report (rank zero), after the module has logged its metrics; a collective."""
        trainer.strategy.barrier("labn-detections")
        if trainer.is_global_zero:
            self._write_tables(trainer, split)
            self._log_pictures(trainer, split)
        trainer.strategy.barrier("labn-detections-written")

    def _image(
        self, trainer: pl.Trainer, network: Any, image: Tensor, truth: tuple[Tensor, Tensor], index: int, split: str
    ) -> None:
        assert self._folder is not None
        data = trainer.datamodule  # type: ignore[attr-defined]
        name, classes = data.sample_name(split, index), ["background", *data.class_names]
        # One forward per image; all questions about its detections are answered from the recorded trace.
        trace = self.crp.trace(network, image)
        best = trace.detections(self.crp.thresholds).best(self.top)
        questions = [Question(p, t, k) for p, k in zip(best.priors.tolist(), best.labels.tolist()) for t in self.tasks]
        maps = self.crp.ask(trace, questions).maps.view(len(best), len(self.tasks), *trace.size)
        head = {"split": split, "index": index, "name": name}
        rows = [head | row for row in detection_rows(best, trace, classes, truth)]
        measured = self.scores(self.crp, trace, best, index) if self.scores and trainer.state.fn != "fit" else []
        shown = displayable(image, data.mean, data.std)
        heats = [dict(zip(self.tasks, heat.cpu().numpy())) for heat in maps]
        record = {
            "detections": rows,
            "scores": [head | score._asdict() for score in measured],
            "cards": [detection_card(shown, r, k, h) for r, k, h in zip(rows, best.labels.tolist(), heats)],
        }
        stem = self._folder / "detections" / f"{index:06d}"
        write_atomically(stem.with_suffix(".safetensors"), packed(maps, best))
        # Rank zero makes the tables of these records; files work across nodes without gathering objects.
        write_atomically(stem.with_suffix(".json"), json.dumps(record).encode())
        picture = draw(shown, rows, maps, self.tasks, name)
        write_atomically(self._folder / "overlays" / f"{index:06d}-{readable_name(name)}.png", picture)

    def _write_tables(self, trainer: pl.Trainer, split: str) -> None:
        assert self._folder is not None
        paths = [self._folder / "detections" / f"{index:06d}.json" for index in sorted(self._chosen)]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        rows, scores, cards = (
            [item for record in records for item in record[key]] for key in ("detections", "scores", "cards")
        )
        summary = summarise(scores)
        write_atomically(self._folder / "detections.csv", as_csv(DETECTIONS, rows))
        paired = pair(scores)
        if scores:
            write_atomically(self._folder / "detection_scores.csv", as_csv(SCORES, scores))
            write_atomically(self._folder / "detection_summary.csv", as_csv(SUMMARY, summary))
            write_atomically(self._folder / "detection_paired.csv", as_csv(PAIRED, paired))
        # Available here because the average precision is logged before `publish` is called.
        facts = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(f"{split}/")}
        classes = ["background", *trainer.datamodule.class_names]  # type: ignore[attr-defined]
        title = f"{self._folder.resolve().parent.name}, {self._folder.name}: detections"
        report = detection_report(title, cards, summary, self.tasks, classes, facts, paired=paired)
        write_atomically(self._folder / "report.html", render(report).encode())
        rank_zero_info(f"{len(rows)} detections of {len(records)} images explained in {self._folder}.")

    def _log_pictures(self, trainer: pl.Trainer, split: str) -> None:
        assert self._folder is not None
        paths = sorted((self._folder / "overlays").glob("*.png"))
        pictures = {path.stem: capped(path.read_bytes()) for path in paths} if trackers_of(trainer.loggers) else {}
        for_each_tracker(
            trainer.loggers,
            self._folder,
            lambda tracker: tracker.log_pictures(f"detections/{split}", pictures, trainer.global_step),
        )


def remove_results(folder: Path) -> None:
    """Remove the detections of an earlier run, which may have used other thresholds or images.

    `report.html` is not removed: it is always overwritten, and other callbacks write it too.
    """
    for name in ("detections", "overlays"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ("detections.csv", "detection_scores.csv", "detection_summary.csv", "detection_paired.csv"):
        (folder / name).unlink(missing_ok=True)


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
    found: Detections, trace: DetectionTrace, classes: Sequence[str], truth: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """The rows of `detections.csv`, one per detection.

    Args:
        found: the detections of one image.
        trace: the forward that they come from.
        classes: class names, the background first.
        truth: boxes (m, 4) x1, y1, x2, y2 in pixels and object classes (m,), counted from 0 without the background.

    Returns:
        Dicts with the columns of `DETECTIONS` after `name`. `source` is the index of the source feature map; `overlap`
        is the largest intersection over union with an object of the same class, 0 if there is none: a false detection
        has a small one.
    """
    boxes, labels = (tensor.to(found.boxes.device) for tensor in truth)
    # Channel 0 is the background, so that object class k is channel k + 1.
    same = found.labels[:, None] == labels[None] + 1
    # The column of zeros gives images without objects a maximum.
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
            "source": trace.layout.unit(prior).source,
            "overlap": overlap,
        }
        for number, (box, score, label, prior, overlap) in enumerate(zip(*columns))
    ]


def draw(image: Any, rows: Sequence[dict[str, Any]], maps: Tensor, tasks: Sequence[str], title: str) -> bytes:
    """The figure of one image and its detections as PNG.

    Args:
        image: (H, W, 3) or (H, W) in [0, 1].
        rows: of `detections.csv`, one per detection.
        maps: (n, tasks, H, W) relevance, in the order of the rows.
        tasks: names of the explained outputs.
        title: name of the image.
    """
    lines = [
        DetectionRow(
            f"{row['class']} {row['score']:.2f}, source map {row['source']}",
            [row[edge] for edge in ("x1", "y1", "x2", "y2")],
            {task: heat.cpu().numpy() for task, heat in zip(tasks, heats)},
        )
        for row, heats in zip(rows, maps)
    ]
    return png_bytes(detection_figure(image, lines, title if lines else f"{title}: no detection"), dpi=110)


def packed(maps: Tensor, found: Detections) -> bytes:
    """The bytes of a safetensors file with the maps and detections of one image."""
    tensors = {"maps": maps, **vars(found)}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def summarise(scores: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `detection_summary.csv`: mean per explainer and metric over detections, with its 95 % interval.

    The bootstrap resamples whole images, because detections of one image are not independent.
    """
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
    """The rows of `detection_paired.csv`: mean difference a - b over detections for every two explainers of a metric.

    Intervals resample whole images. The baseline `random` is always b.
    """
    columns: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    for row in scores:
        column = columns.setdefault(row["metric"], {}).setdefault(row["explainer"], {})
        column[row["index"], row["detection"]] = row["value"]
    rows = []
    for metric, compared in zip(columns, compare_values(map(_value, columns.values()))):
        names = _random_last(columns[metric])
        for (a, b), d in compared.differences.items():
            figures = (names[a], names[b], metric, d.mean, d.low, d.high, d.n, d.p, d.p_adjusted)
            rows.append(dict(zip(PAIRED, figures)))
    return rows


def _random_last(explainers: Iterable[str]) -> list[str]:
    return sorted(explainers, key=lambda name: name == "random")


def _value(columns: dict[str, dict[tuple[int, int], float]]) -> Value:
    """The values of a metric by (image, detection) as a table of all detections; the images are the groups."""
    detections = sorted(set().union(*columns.values()))
    values = [[columns[name].get(key, math.nan) for name in _random_last(columns)] for key in detections]
    images = torch.tensor([image for image, _ in detections])
    return Value(torch.tensor(values, dtype=torch.float64), groups=images)


def as_csv(header: Sequence[str], rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as a CSV file with a header."""
    return csv_bytes(header, ([row.get(name, "") for name in header] for row in rows))
