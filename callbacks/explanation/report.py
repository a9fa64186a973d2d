"""Write `report.html`: tables, curves, gallery and logs of a stage on one page that opens from disk."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.explanation.base import ExplainingCallback
from callbacks.explanation.lifecycle import evenly_spaced
from callbacks.explanation.session import ExplainedBatch
from labn.errors import InputError
from labn.io.atomic import write_atomically
from labn.metrics.base import SampleMetric, ScoredBatch
from labn.metrics.insertion_deletion import PatchInsertionDeletion
from labn.postprocess.overlay import displayable
from labn.report import Picture, RunInfo, make_card, read_stage, render, run_report
from labn.report.cards import fill_uri, steps_text
from labn.report.caveats import chance_caveat
from labn.results.reader import CARDS, Card

FINE_GRID = 1024
"""Patches per image up to which the order of removal is stored for every sample of the gallery."""


class ReportCallback(ExplainingCallback):
    """Write one self-contained page per stage, `<run_dir>/<stage>/report.html`.

    Every rank saves small pictures and maps of its own samples. Rank zero combines them with the tables, curves and
    logs of the run folder. The records of the gallery stay in `cards.json`, for comparisons of several runs.

    Args:
        max_images: maximum number of samples in the gallery, evenly spaced over the explained ones.
        picture_side: longer side of the pictures in pixels.
        map_side: longer side of the maps in pixels.
        max_megabytes: maximum size of the gallery in megabytes; samples are left out evenly until it fits.
        fine_images: number of samples in the player if there are more than 1024 patches per image; the order in which
            so many patches are removed takes more bytes than the map.
        kwargs: arguments of `ExplainingCallback`.

    Raises:
        InputError: one of the sizes is 0 or negative.
    """

    def __init__(
        self,
        max_images: int = 500,
        picture_side: int = 160,
        map_side: int = 96,
        max_megabytes: float = 36.0,
        fine_images: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"max_images": max_images, "picture_side": picture_side, "map_side": map_side}
        for name, value in {**sizes, "max_megabytes": max_megabytes}.items():
            if value <= 0:
                raise InputError(f"{name} is {value}; it must be above 0.")
        self.max_images, self.max_megabytes, self.fine_images = max_images, max_megabytes, fine_images
        self.picture_side, self.map_side = picture_side, map_side

    def prepare(self, trainer: pl.Trainer) -> None:
        """Choose the samples."""
        explained = sorted(self.session.samples)
        chosen = [explained[k] for k in evenly_spaced(len(explained), self.max_images)]
        self._chosen = set(chosen)
        self._fine = {chosen[k] for k in evenly_spaced(len(chosen), self.fine_images)}

    def work_on(self, trainer: pl.Trainer, batch: ExplainedBatch) -> None:
        """Save the gallery records of the batch's chosen samples."""
        session = self.session
        positions = [n for n, index in enumerate(batch.indices.tolist()) if index in self._chosen]
        if not positions:
            return
        maps = {name: session.maps(batch, name) for name in session.explainers}
        data = trainer.datamodule  # type: ignore[attr-defined]
        cards = [self._card(data, batch, maps, row) for row in positions]
        if played := player_metric(session.metrics):
            self._add_steps(data, batch, maps, dict(zip(positions, cards)), played[1])
        # The name holds the rank, so that no two processes write the same file.
        path = session.results.folder / "cards" / f"{int(batch.indices[positions[0]]):07d}.r{trainer.global_rank}.json"
        write_atomically(path, json.dumps(cards).encode())

    def _card(self, data: Any, batch: ExplainedBatch, maps: dict[str, Tensor], row: int) -> Card:
        index, label, prediction = (int(v[row]) for v in (batch.indices, batch.labels, batch.predictions))
        picture = Picture(
            index=index,
            name=data.sample_name(self.session.split, index),
            label=label,
            prediction=prediction,
            target=int(batch.targets[row]),
            probability=float(batch.probabilities[row, label]),
            confidence=float(batch.probabilities[row, prediction]),
            image=displayable(batch.images[row], data.mean, data.std),
            mask=None if batch.masks is None else batch.masks[row].cpu().numpy(),
            boxes=None if batch.boxes is None else np.asarray(batch.boxes[row].cpu()),
        )
        heats = {name: heat[row].cpu().numpy() for name, heat in maps.items()}
        return make_card(picture, heats, picture_side=self.picture_side, map_side=self.map_side)

    def _add_steps(
        self,
        data: Any,
        batch: ExplainedBatch,
        maps: dict[str, Tensor],
        cards: dict[int, Card],
        metric: PatchInsertionDeletion,
    ) -> None:
        """Add the player's data to the cards of scored samples: the step at which each patch moves, and the fills."""
        steps = {name: metric.steps(heat, batch.indices).cpu().numpy() for name, heat in maps.items()}
        first = next(iter(maps.values()))
        scored = ScoredBatch(
            self.session.network, batch.images, first, batch.targets, batch.indices,
            labels=batch.labels, predictions=batch.predictions,
        )  # fmt: skip
        fills = [metric.filling(scored, name).cpu() for name in (metric.fill, metric.deletion_fill)]
        for row in set(metric.included(scored).tolist()) & cards.keys():
            coarse = steps[next(iter(steps))][row].size <= FINE_GRID
            if coarse or cards[row]["index"] in self._fine:
                cards[row]["steps"] = {name: steps_text(grid[row]) for name, grid in steps.items()}
                # A fill that is the same for all images, such as a colour, has one row.
                cards[row]["fills"] = [
                    fill_uri(displayable(fill[row if len(fill) > 1 else 0], data.mean, data.std), self.picture_side)
                    for fill in fills
                ]

    def publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Write the page from the cards of all ranks and the tables (rank zero); a collective."""
        # All ranks must have written their cards and rank zero its tables.
        trainer.strategy.barrier("labn-report")
        if not trainer.is_global_zero:
            return
        folder = self.session.results.folder
        collect_cards(folder, self._chosen)
        # Lightning flushes its CSV log every 100 steps; the report reads it now.
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
        data = trainer.datamodule  # type: ignore[attr-defined]
        run_dir = Path(trainer.default_root_dir)
        # With fast_dev_run the results lie in a temporary folder outside the run folder.
        stage = folder.relative_to(run_dir) if folder.is_relative_to(run_dir) else ""
        played = player_metric(self.session.metrics)
        figures, labels = stage_figures(trainer, split), data.labels(split).tolist()
        chance = chance_caveat(figures.get(f"{split}/accuracy"), labels)
        info = RunInfo(
            title=f"{run_dir.resolve().name}: {stage or split}",
            run_dir=run_dir,
            class_names=list(data.class_names),
            split_size=len(labels),
            figures=figures,
            notes=(*((chance,) if chance else ()), *data.notes),
            player=None if played is None else player_facts(*played, data.image_size),
            max_bytes=int(self.max_megabytes * 1e6),
            epoch=trainer.current_epoch if trainer.state.fn == "fit" else None,
            command=trainer.state.fn.value if trainer.state.fn else "test",
        )
        page = render(run_report(read_stage(folder, self._chosen, scratch_dir=folder), info))
        write_atomically(folder / "report.html", page.encode())


def player_metric(metrics: Mapping[str, SampleMetric]) -> tuple[str, PatchInsertionDeletion] | None:
    """The insertion-deletion metric of the player: that with the largest patches, preferably in the paper's protocol.

    Returns:
        The name under which its curves are stored, such as `pid1` or `insertion16`, and the metric; None if there is
        no insertion-deletion metric.
    """
    stepped = [(n, m) for n, m in metrics.items() if isinstance(m, PatchInsertionDeletion)]
    plain = [(n, m) for n, m in stepped if m.protocol == "paper" and m.ties == "fraction"]
    return max(plain or stepped, key=lambda named: named[1].patch_size, default=None)


def player_facts(name: str, metric: PatchInsertionDeletion, image_size: int) -> dict[str, Any]:
    """Name, patch size and image size (H, W) in pixels of the player's metric, for the page."""
    return {"metric": name, "patch": metric.patch_size, "size": [image_size, image_size]}


def stage_figures(trainer: pl.Trainer, split: str) -> dict[str, float]:
    """Finite logged metrics of the model, such as `test/accuracy`, without the scores of maps."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Scores of maps have two slashes: `test/<explainer>/<metric>`.
    return {n: v for n, v in logged.items() if n.startswith(f"{split}/") and n.count("/") == 1 and math.isfinite(v)}


def collect_cards(stage: Path, chosen: set[int]) -> None:
    """Merge the cards of all ranks, each sample once and in order, into the stage's `cards.json`."""
    paths = sorted((stage / "cards").glob("*.json"))
    cards = {card["index"]: card for path in paths for card in json.loads(path.read_text())}
    # By index, so that a sample that two ranks have explained, as a padding sampler makes them do, appears once.
    gallery = [card for index, card in sorted(cards.items()) if index in chosen]
    write_atomically(stage / CARDS, json.dumps(gallery).encode())
    shutil.rmtree(stage / "cards", ignore_errors=True)
