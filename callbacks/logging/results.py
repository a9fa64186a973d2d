"""Log the results of a stage to the trackers under stable keys: overlays, curves, and one table of samples."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from PIL import Image

from callbacks.logging.trackers import Tracker, trackers_of
from labn.errors import without_credentials
from labn.io.readers import read_table
from labn.postprocess.overlay import png_bytes
from labn.report.curves import curve_metrics, curve_panels
from labn.report.figures import panels_figure
from labn.results.reader import StageResults, read_stage

MAX_SIDE = 1600
"""Maximum longer side in pixels of an uploaded picture."""


def for_each_tracker(loggers: Sequence[Logger], folder: Path, log: Callable[[Tracker[Any]], None]) -> None:
    """Call `log` with every tracker; a failure is a warning and does not end the run.

    Args:
        loggers: `trainer.loggers`.
        folder: the results folder, for the warning.
        log: logs to one tracker.
    """
    for tracker in trackers_of(loggers):
        # Any error: the service, its package or the network may fail in ways that are not documented.
        try:
            log(tracker)
        except Exception as error:
            if getattr(tracker.logger, "lost", False):  # The logger has warned about that itself.
                continue
            reason = without_credentials(str(error))  # MLflow's errors name the address of the request
            warnings.warn(f"{tracker.name} did not take the results ({reason}); they are in {folder}.", stacklevel=2)


def log_results(
    tracker: Tracker[Any], folder: Path, split: str, overlays: list[Path], step: int, table: bool = True
) -> None:
    """Log the pictures, curves and, optionally, the table of a results folder.

    Keys: `maps/<split>` (overlays), `curves/<split>/<metric>` (pictures of the mean curves) and, with `table`,
    `samples/<split>` (one row per overlay with picture, label, prediction and scores). The means are logged as numbers
    by `EvaluationCallback`.

    Args:
        tracker: the tracker.
        folder: the results folder.
        split: val or test.
        overlays: pictures to log, named `<index>-<name>.png`.
        step: the trainer's global step.
        table: whether to log the table, which is not for every epoch: Weights & Biases takes a key's table only once.
    """
    pictures = {int(path.name.split("-")[0]): capped(path.read_bytes()) for path in overlays}
    results = read_stage(folder, pictures, scratch_dir=folder)
    if pictures:
        tracker.log_pictures(f"maps/{split}", dict(zip([p.stem for p in overlays], pictures.values())), step)
    for metric in curve_metrics(results.curves):
        panels = curve_panels(results.curves, results.explainers, metric, folder, results.quantity)
        picture = capped(png_bytes(panels_figure(panels), dpi=100))
        tracker.log_pictures(f"curves/{split}/{metric}", {"": picture}, step)
    if table and pictures:
        tracker.log_table(f"samples/{split}", *sample_table(results, pictures), step)


def capped(data: bytes, side: int = MAX_SIDE) -> Image.Image:
    """A PNG as an RGB picture whose longer side is at most `side` pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((side, side))
    return picture


def sample_table(results: StageResults, pictures: dict[int, Image.Image]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of samples; the column `maps` holds the pictures."""
    columns = [(e, m) for e in results.explainers for m in results.headline if (e, m) in results.scores]
    predictions = _predictions(results.folder / "predictions.csv", pictures)
    rows = []
    for index, picture in pictures.items():
        prediction = predictions.get(index, {})
        facts = [prediction.get(name, "") for name in ("name", "label", "prediction", "probability")]
        values = [results.scores[key].get(index) for key in columns]
        rows.append([index, *facts, picture, *values])
    header = ["index", "name", "label", "prediction", "probability", "maps"]
    return [*header, *("/".join(key) for key in columns)], rows


def _predictions(path: Path, samples: Collection[int]) -> dict[int, dict[str, str]]:
    if not path.exists():
        return {}
    rows = read_table(path, ("index",), escaped=True)
    return {index: row.cells for row in rows if (index := row.number("index", int)) in samples}
