"""Scores of the maps of single pictures, for `python cli.py explain --metric`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from labn.api import evaluate
from labn.explainers import Explainer, explainer_by_name
from labn.io.preprocessing import Preprocessing
from labn.io.table_cells import write_csv
from labn.metrics.registry import metric_by_name
from labn.metrics.scores import Scores
from labn.results.tables import BASELINES, compare_methods, reading, summary_table

COLUMNS = ("file", "explained", "explainer", "metric", "value")


class PictureScores:
    """Scores of the methods, and of `random` and `constant`, picture by picture, and the table of their means.

    Args:
        explainers: method -> explainer, which metrics that explain again run.
        metrics: names of the metrics; they must need no masks.

    Raises:
        InputError: a metric is unknown.
    """

    def __init__(self, explainers: Mapping[str, Explainer], metrics: Sequence[str]) -> None:
        for metric in metrics:
            metric_by_name(metric)
        self.metrics = list(metrics)
        baselines = {name: explainer_by_name(name) for name in BASELINES if name not in explainers}
        self.explainers = {**explainers, **baselines}
        self._scores: list[dict[str, Scores]] = []
        self._pictures: list[tuple[str, str]] = []

    def add(
        self,
        network: nn.Module,
        image: Tensor,
        maps: Mapping[str, Tensor],
        target: int,
        index: Tensor,
        preprocessing: Preprocessing,
        shown: tuple[str, str],
    ) -> None:
        """Score the maps of one picture.

        Args:
            network: the explained network.
            image: (1, C, H, W), normalised.
            maps: method -> (H, W).
            target: the explained class.
            index: (1,) position of the picture, which seeds random maps.
            preprocessing: what has normalised the image.
            shown: the picture's file and the name of the explained class, for the table.

        Raises:
            InputError: a metric needs masks, or does not fit the size of the image.
        """
        statistics, targets = (preprocessing.mean, preprocessing.std), torch.tensor([target], device=image.device)
        found = {}
        for method, given in self.explainers.items():
            explainer = given.for_normalised(*statistics)
            # `random` and `constant` are made here unless they were asked for.
            own = maps[method][None] if method in maps else None
            if own is None and method not in BASELINES:
                continue  # the method gave no map
            own = explainer(network, image, targets, index) if own is None else own.to(image.device)
            settings = {"explainer": explainer, "indices": index, "mean": statistics[0], "std": statistics[1]}
            found[method] = evaluate(network, image, own, targets, self.metrics, **settings)
        self._scores.append(found)
        self._pictures.append(shown)

    def write(self, folder: Path) -> str:
        """Write `scores.csv`, one row per picture, method and value.

        Returns:
            The table of means with 95 % intervals, and what PID says about the best method.
        """
        names = list(dict.fromkeys(name for found in self._scores for scores in found.values() for name in scores))
        rows = (
            (*picture, method, name, float(values))
            for picture, found in zip(self._pictures, self._scores)
            for method, scores in found.items()
            for name, values in scores.items()
        )
        write_csv(folder / "scores.csv", COLUMNS, rows)
        columns = {name: torch.stack([self._column(method, name) for method in self.explainers], 1) for name in names}
        statistics = compare_methods(list(self.explainers), names, columns.__getitem__)
        sentences = [reading(statistics.means, statistics.differences, name) for name in names]
        return "\n".join([summary_table(statistics.means, names), *filter(None, sentences)])

    def _column(self, method: str, name: str) -> Tensor:
        """(N,) float64 values of a method, NaN where it gave no map."""
        missing = Scores({name: torch.full((1,), torch.nan, dtype=torch.float64)})
        return torch.cat([found.get(method, missing)[name].cpu() for found in self._scores])
