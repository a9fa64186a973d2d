"""Explain the best detections of every image: up to five maps each, pictures, and scores."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save
from torch import Tensor

from callbacks.session import epoch_of, evenly_spaced, network_of
from labn.detection_plots import DetectionRow, detection_figure
from labn.explainers.crp import CRP, TASKS, Question, Task
from labn.explainers.detection import DetectionPassage
from labn.metrics.detection import DetectionScores
from labn.metrics.statistics import bootstrap_mean
from labn.models.detectors import Detections
from labn.plots import displayable
from labn.store import file_name, write_atomically

DETECTIONS = ("split", "index", "name", "detection", "class", "score", "x1", "y1", "x2", "y2", "prior", "source")
SCORES = ("split", "index", "name", "detection", "explainer", "metric", "value")
SUMMARY = ("explainer", "metric", "mean", "ci_low", "ci_high", "n")


class DetectionCallback(pl.Callback):
    """CRP maps of the best detections at validation and test end.

    In `<run_dir>/<stage>/` every explained image leaves `detections/<index>.safetensors` (`maps` (n, tasks, H, W),
    `boxes`, `scores`, `labels`, `priors`) and `overlays/<index>-<name>.png`; all together `detections.csv` and, with
    `scores`, `detection_scores.csv` and `detection_summary.csv` (means over detections with 95 % intervals that draw
    whole images). An image without detection leaves a picture and no row. Pictures also go to Weights & Biases.

    Args:
        crp: the explainer; its thresholds say what is a detection. None: defaults with a score threshold of .3.
        tasks: what is explained of every detection: `class`, `cx`, `cy`, `w`, `h`.
        top: detections explained per image.
        val_images: images explained at validation end while fitting, evenly spaced over the split.
        test_images: images explained at test end and by `validate`; None explains all.
        every_n_epochs: explain every n-th validation epoch while fitting; 0 never does.
        scores: measures the maps at test end; None does not.
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
            raise ValueError(f"tasks has {unknown.pop()!r}; it must be some of {', '.join(TASKS)}.")
        self.crp = crp or CRP(score_threshold=0.3)
        self.tasks, self.top = tuple(tasks), top
        self.val_images, self.test_images, self.every_n_epochs = val_images, test_images, every_n_epochs
        self.scores = scores
        self._folder: Path | None = None
        self._chosen: set[int] = set()

    # When

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer whose loops forbid gradients."""
        if any(loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop)):
            raise MisconfigurationException(
                "DetectionCallback needs gradients at validation and test end: set trainer.inference_mode to false."
            )

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        self._folder = None
        fitting = trainer.state.fn == "fit"
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self.val_images > 0
        if trainer.sanity_checking or (fitting and not due):
            return
        stage = f"val/{epoch_of(trainer, pl_module)}" if split == "val" else split
        fast = getattr(trainer, "fast_dev_run", False)
        root = Path(tempfile.mkdtemp(prefix="labn-")) if fast else Path(trainer.default_root_dir)
        self._folder = Path(trainer.strategy.broadcast(str(root))) / stage
        size = len(trainer.datamodule.source(split))  # type: ignore[attr-defined]
        self._chosen = set(evenly_spaced(size, self.val_images if fitting else self.test_images))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose folder and images."""
        self._open(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose folder and images."""
        self._open(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Explain the chosen images of a validation batch."""
        self._batch(trainer, pl_module, batch, "val")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Explain the chosen images of a test batch."""
        self._batch(trainer, pl_module, batch, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the tables."""
        self._finish(trainer, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the tables."""
        self._finish(trainer, "test")

    # What

    def _batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], split: str) -> None:
        if self._folder is None:
            return
        network = network_of(pl_module)
        for row, index in enumerate(batch["index"].tolist()):
            if index in self._chosen:
                self._image(trainer, network, batch["image"][row].float(), index, split)

    def _image(self, trainer: pl.Trainer, network: Any, image: Tensor, index: int, split: str) -> None:
        assert self._folder is not None
        data = trainer.datamodule  # type: ignore[attr-defined]
        name, classes = data.sample_name(split, index), ["background", *data.class_names]
        passage = self.crp.passage(network, image)
        found = passage.detections(self.crp.thresholds).best(self.top)
        questions = [
            Question(p, t, k) for p, k in zip(found.priors.tolist(), found.labels.tolist()) for t in self.tasks
        ]
        answers = self.crp.ask(passage, questions)
        maps = answers.maps.view(len(found), len(self.tasks), *passage.size)
        write_atomically(self._folder / "detections" / f"{index:06d}.safetensors", _packed(maps, found))
        head = {"split": split, "index": index, "name": name}
        measured = self.scores(self.crp, passage, found, index) if self.scores and trainer.state.fn != "fit" else []
        record = {
            "detections": [{**head, **row} for row in describe(found, passage, classes)],
            "scores": [{**head, **score._asdict()} for score in measured],
        }
        write_atomically(self._folder / "detections" / f"{index:06d}.json", json.dumps(record).encode())
        picture = draw(displayable(image, data.mean, data.std), found, maps, self.tasks, record["detections"], name)
        write_atomically(self._folder / "overlays" / f"{index:06d}-{file_name(name)}.png", picture)

    def _finish(self, trainer: pl.Trainer, split: str) -> None:
        if self._folder is None:
            return
        trainer.strategy.barrier("labn-detections")
        if trainer.is_global_zero:
            records = [json.loads(p.read_text()) for p in sorted((self._folder / "detections").glob("*.json"))]
            rows = [row for record in records for row in record["detections"]]
            scores = [row for record in records for row in record["scores"]]
            write_atomically(self._folder / "detections.csv", as_csv(DETECTIONS, rows))
            if scores:
                summary = summarise(scores)
                write_atomically(self._folder / "detection_scores.csv", as_csv(SCORES, scores))
                write_atomically(self._folder / "detection_summary.csv", as_csv(SUMMARY, summary))
            rank_zero_info(f"{len(rows)} detections of {len(records)} images explained in {self._folder}.")
            self._log_pictures(trainer, split)
        trainer.strategy.barrier("labn-detections-written")

    def _log_pictures(self, trainer: pl.Trainer, split: str) -> None:
        assert self._folder is not None
        paths = [str(p) for p in sorted((self._folder / "overlays").glob("*.png"))]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"detections/{split}", paths, caption=[Path(p).stem for p in paths])


def describe(found: Detections, passage: DetectionPassage, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row of `detections.csv` per detection; `source` counts the source maps from 0."""
    rows = []
    for number, (box, score, label, prior) in enumerate(
        zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.priors.tolist())
    ):
        corners = dict(zip(("x1", "y1", "x2", "y2"), box))
        source = passage.layout.unit(prior).source
        rows.append(
            {"detection": number, "class": classes[label], "score": score, **corners, "prior": prior, "source": source}
        )
    return rows


def draw(
    image: Any, found: Detections, maps: Tensor, tasks: Sequence[str], rows: Sequence[dict[str, Any]], title: str
) -> bytes:
    """The picture of one image as PNG."""
    lines = [
        DetectionRow(
            f"{row['class']} {row['score']:.2f}, source map {row['source']}",
            box,
            {task: heat.cpu().numpy() for task, heat in zip(tasks, heats)},
        )
        for row, box, heats in zip(rows, found.boxes.tolist(), maps)
    ]
    buffer = io.BytesIO()
    detection_figure(image, lines, title if lines else f"{title}: no detection").savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _packed(maps: Tensor, found: Detections) -> bytes:
    tensors = {
        "maps": maps,
        "boxes": found.boxes,
        "scores": found.scores,
        "labels": found.labels,
        "priors": found.priors,
    }
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


def as_csv(header: Sequence[str], rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
