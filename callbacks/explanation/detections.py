"""Explain the best detections of every image: up to five maps each, pictures, and scores."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from torch import Tensor
from torchvision.ops import box_iou

from callbacks.explanation.lifecycle import Schedule, StageCallback, check_counts, stage_folder
from callbacks.explanation.session import identity_of, network_of
from labn.errors import InputError
from labn.explainers.relevance.crp import CRP, TASKS, Question, Task
from labn.explainers.relevance.detection_trace import DetectionTrace
from labn.io.atomic import write_atomically
from labn.metrics.detection import DetectionScores, check_contrast
from labn.metrics.statistics import bootstrap_mean, paired_difference
from labn.models.detectors import Detections
from labn.report import render
from labn.report.detections import detection_card, detection_report
from labn.report.figures import DetectionRow, detection_figure, displayable
from labn.results.shard_index import readable_name
from labn.results.store import ResultStore
from labn.results.tables import PAIRED, SUMMARY


class DetectionCallback(StageCallback):
    """CRP maps of the best detections at validation and test end.

    In `<run_dir>/<stage>/` every explained image leaves `detections/<index>.safetensors` (`maps` (n, tasks, H, W),
    `boxes`, `scores`, `labels`, `priors`) and `overlays/<index>-<name>.png`; all together `detections.csv` and, with
    `scores`, `detection_scores.csv`, `detection_summary.csv` (means over detections with 95 % intervals that draw
    whole images) and `detection_paired.csv` (differences of two explainers), and `report.html`. An image without
    detection leaves a picture and no row. Pictures also go to Weights & Biases. Everything is computed anew: what an
    earlier run with the same weights and data has left of these in the folder is replaced, results of other ones are
    moved aside (`test.old-1`).

    Args:
        crp: the explainer; its thresholds say what is a detection. None: defaults with a score threshold of .3.
        tasks: what is explained of every detection: `class`, `cx`, `cy`, `w`, `h`.
        top: detections explained per image.
        val_images: images explained at validation end while fitting, evenly spaced over the split.
        test_images: images explained at test end and by `validate`; None explains all.
        every_n_epochs: explain every n-th validation epoch while fitting; 0 never does.
        scores: measures the maps at test end, of a `crp` with contrast; None does not.

    Raises:
        ValueError: an unknown task, scores of a `crp` without contrast, a negative number, or no image at test end.
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
        """Results folder of the present stage; None before one has begun."""
        return self._folder

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Choose folder and images; a collective."""
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
        """Write the tables (rank zero), when the module has logged its figures; a collective."""
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
        trace = self.crp.trace(network, image)
        found = trace.detections(self.crp.thresholds).best(self.top)
        questions = [
            Question(p, t, k) for p, k in zip(found.priors.tolist(), found.labels.tolist()) for t in self.tasks
        ]
        maps = self.crp.ask(trace, questions).maps.view(len(found), len(self.tasks), *trace.size)
        head = {"split": split, "index": index, "name": name}
        rows = [head | row for row in detection_rows(found, trace, classes, truth)]
        measured = self.scores(self.crp, trace, found, index) if self.scores and trainer.state.fn != "fit" else []
        shown = displayable(image, data.mean, data.std)
        heats = [dict(zip(self.tasks, heat.cpu().numpy())) for heat in maps]
        record = {
            "detections": rows,
            "scores": [head | score._asdict() for score in measured],
            "cards": [detection_card(shown, r, k, h) for r, k, h in zip(rows, found.labels.tolist(), heats)],
        }
        kept = self._folder / "detections" / f"{index:06d}"
        write_atomically(kept.with_suffix(".safetensors"), packed(maps, found))
        write_atomically(kept.with_suffix(".json"), json.dumps(record).encode())
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
        if scores:
            write_atomically(self._folder / "detection_scores.csv", as_csv(SCORES, scores))
            write_atomically(self._folder / "detection_summary.csv", as_csv(SUMMARY, summary))
            write_atomically(self._folder / "detection_paired.csv", as_csv(PAIRED, pair(scores)))
        facts = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(f"{split}/")}
        classes = ["background", *trainer.datamodule.class_names]  # type: ignore[attr-defined]
        title = f"{self._folder.resolve().parent.name}, {self._folder.name}: detections"
        report = detection_report(title, cards, summary, self.tasks, classes, facts)
        write_atomically(self._folder / "report.html", render(report).encode())
        rank_zero_info(f"{len(rows)} detections of {len(records)} images explained in {self._folder}.")

    def _log_pictures(self, trainer: pl.Trainer, split: str) -> None:
        assert self._folder is not None
        paths = [str(p) for p in sorted((self._folder / "overlays").glob("*.png"))]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"detections/{split}", paths, caption=[Path(p).stem for p in paths])


def remove_results(folder: Path) -> None:
    """Remove the detections of an earlier run, which may be those of other thresholds or images.

    `report.html` stays: it is always written anew, and other callbacks write it too.
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
            "source": trace.layout.unit(prior).source,
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
