"""Mean insertion and deletion curves with their bands, from the curves of all samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from labn.report.charts import Panel, Series

GRID = np.linspace(0, 1, 101)


def on_grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Curves (n, K) at abscissae (n, K), linearly between their points, at the 101 points of `GRID`: (n, 101)."""
    return np.stack([np.interp(GRID, own, values) for own, values in zip(x, y)])


def band(
    curves: np.ndarray, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over samples and, point by point, its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        curves: (n, P).
        groups: (n,) integer; samples of one group are drawn together. None: every sample is one.
        resamples: number of resamples.
        seed: of the generator; equal input gives equal digits.

    Returns:
        Mean, lower and upper bound, each (P,).
    """
    _, place, sizes = np.unique(
        np.arange(len(curves)) if groups is None else groups, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(sizes), curves.shape[1]))
    np.add.at(sums, place, curves)
    drawn = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples)
    low, high = np.percentile(drawn @ sums / (drawn @ sizes)[:, None], [2.5, 97.5], axis=0)
    return curves.mean(0), low, high


def curve_panels(curves: Mapping[str, np.ndarray], explainers: list[str], metric: str) -> list[Panel]:
    """An insertion and a deletion panel of one metric, one line per explainer.

    Args:
        curves: arrays `<explainer>/<metric>/{x,insertion,deletion}`, as in `curves.npz`, and `.../group` (n,) where
            samples of a group are drawn together.
        explainers: in the order of the table, which also fixes their colours.
        metric: its name.
    """
    panels = []
    for line in ("insertion", "deletion"):
        series = []
        for place, explainer in enumerate(explainers):
            key = f"{explainer}/{metric}"
            if f"{key}/x" in curves:
                own = on_grid(curves[f"{key}/x"], curves[f"{key}/{line}"])
                mean, low, high = band(own, curves.get(f"{key}/group"))
                series.append(Series(explainer, place, GRID, mean, low, high))
        panels.append(Panel(f"{metric}: {line}", "fraction of patches", "probability", tuple(series), (0.0, 1.0)))
    return panels


def curve_metrics(curves: Mapping[str, np.ndarray]) -> list[str]:
    """Metrics that have curves, in the order of the file."""
    return list(dict.fromkeys(name.split("/")[-2] for name in curves if name.endswith("/x")))
