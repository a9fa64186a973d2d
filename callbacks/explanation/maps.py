"""Pictures of maps, for the results folder and for experiment trackers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from callbacks.explanation.base import ExplainingCallback
from callbacks.explanation.lifecycle import check_counts, evenly_spaced
from callbacks.explanation.session import ExplainedBatch
from callbacks.logging.results import for_each_tracker, log_results
from labn.io.atomic import write_atomically
from labn.postprocess.overlay import displayable, overlay_figure, png_bytes
from labn.results.shard_index import readable_name


class MapLogger(ExplainingCallback):
    """Draw samples with the maps of every explainer, one PNG per sample in `<run_dir>/<stage>/overlays/`.

    Args:
        max_images: number of samples drawn per stage, evenly spaced over the explained ones.
        kwargs: arguments of `ExplainingCallback`.

    Raises:
        InputError: `max_images` is negative.
    """

    def __init__(self, max_images: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counts(max_images=max_images)
        self.max_images = max_images

    def prepare(self, trainer: pl.Trainer) -> None:
        """Choose the samples."""
        explained = sorted(self.session.samples)
        self._chosen = {explained[k] for k in evenly_spaced(len(explained), self.max_images)}

    def work_on(self, trainer: pl.Trainer, batch: ExplainedBatch) -> None:
        """Draw the chosen samples of the batch."""
        data, session = trainer.datamodule, self.session  # type: ignore[attr-defined]
        positions = [n for n, index in enumerate(batch.indices.tolist()) if index in self._chosen]
        maps = {name: session.maps(batch, name).cpu().numpy() for name in session.explainers} if positions else {}
        for row in positions:
            index = int(batch.indices[row])
            name = data.sample_name(session.split, index)
            names = data.class_names
            label, prediction = int(batch.labels[row]), int(batch.predictions[row])
            title = (
                f"{name}: {names[label]}, predicted {names[prediction]} "
                f"({float(batch.probabilities[row, prediction]):.2f}), explained {names[int(batch.targets[row])]}"
            )
            figure = overlay_figure(
                displayable(batch.images[row], data.mean, data.std),
                {method: heat[row] for method, heat in maps.items()},
                None if batch.masks is None else batch.masks[row].cpu().numpy(),
                title,
            )
            path = session.results.folder / "overlays" / f"{index:06d}-{readable_name(name)}.png"
            write_atomically(path, png_bytes(figure, dpi=100))

    def publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        """Log the pictures of all ranks, the curves and the table to the trackers (rank zero); a collective."""
        # The pictures of all ranks must be on disk before rank zero lists them.
        trainer.strategy.barrier("labn-overlays")
        if not trainer.is_global_zero:
            return
        folder, is_fit = self.session.results.folder, trainer.state.fn == "fit"
        paths = sorted((folder / "overlays").glob("*.png"))
        paths = [path for path in paths if int(path.name.split("-")[0]) in self._chosen]
        for_each_tracker(
            trainer.loggers,
            folder,
            lambda tracker: log_results(tracker, folder, split, paths, trainer.global_step, table=not is_fit),
        )
