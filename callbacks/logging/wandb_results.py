"""Log the results of a stage to Weights & Biases under stable keys: overlays, curves, and one table with pictures."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from labn.io.readers import read_table
from labn.postprocess.overlay import png_bytes
from labn.report.curves import curve_metrics, curve_panels
from labn.report.figures import panels_figure
from labn.results.reader import StageResults, read_stage

MAX_SIDE = 1600
"""Maximum longer side in pixels of an uploaded picture."""


def log_results(logger: WandbLogger, folder: Path, split: str, overlays: list[Path], table: bool) -> None:
    """Log the pictures, curves and, optionally, the table of a results folder.

    Keys: `maps/<split>` (overlays), `curves/<split>/<metric>` (pictures of the mean curves) and, with `table`,
    `samples/<split>` (one row per overlay with picture, label, prediction and scores). The means are logged as numbers
    by `EvaluationCallback`.

    Args:
        logger: the logger of this process.
        folder: the results folder.
        split: val or test.
        overlays: pictures to log, named `<index>-<name>.png`.
        table: whether to log the table; a key of a table can be written only once, so not in every epoch.
    """
    pictures = {int(path.name.split("-")[0]): capped(path.read_bytes()) for path in overlays}
    results = read_stage(folder, pictures, scratch_dir=folder)
    if pictures:
        logger.log_image(f"maps/{split}", list(pictures.values()), caption=[path.stem for path in overlays])
    for metric in curve_metrics(results.curves):
        panels = curve_panels(results.curves, results.explainers, metric, folder, results.quantity)
        logger.log_image(f"curves/{split}/{metric}", [capped(png_bytes(panels_figure(panels), dpi=100))])
    if table and pictures:
        logger.log_table(f"samples/{split}", *sample_table(results, pictures))


def capped(data: bytes, side: int = MAX_SIDE) -> Image.Image:
    """A PNG as an RGB picture whose longer side is at most `side` pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((side, side))
    return picture


def sample_table(results: StageResults, pictures: dict[int, Image.Image]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of samples."""
    import wandb  # imported here, because it is slow to import and not needed when logging is disabled

    columns = [(e, m) for e in results.explainers for m in results.headline if (e, m) in results.scores]
    predictions = _predictions(results.folder / "predictions.csv", pictures)
    rows = []
    for index, picture in pictures.items():
        prediction = predictions.get(index, {})
        facts = [prediction.get(name, "") for name in ("name", "label", "prediction", "probability")]
        values = [results.scores[key].get(index) for key in columns]
        rows.append([index, *facts, wandb.Image(picture), *values])
    header = ["index", "name", "label", "prediction", "probability", "maps"]
    return [*header, *("/".join(key) for key in columns)], rows


def _predictions(path: Path, samples: Collection[int]) -> dict[int, dict[str, str]]:
    if not path.exists():
        return {}
    rows = read_table(path, ("index",), escaped=True)
    return {index: row.cells for row in rows if (index := row.number("index", int)) in samples}
