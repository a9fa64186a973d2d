"""Mean insertion and deletion curves with their bands, from the curves of all samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from labn.io.memmap import blocks, temporary_memmap
from labn.report.charts import Panel, Series

GRID = np.linspace(0, 1, 101)
PROBABILITY, UNIT = "probability", (0.0, 1.0)
_BLOCK = 1 << 22  # counts of draws held at once


def on_grid(x: np.ndarray, y: np.ndarray, scratch_dir: Path | None = None) -> np.ndarray:
    """Curves (n, K) at abscissae (n, K), linearly between their points, at the 101 points of `GRID`: (n, 101).

    They lie on the disk of the folder `scratch_dir`, where one is given.
    """
    grid = temporary_memmap((len(x), len(GRID)), np.float64, scratch_dir)
    for rows in blocks(len(x)):
        grid[rows] = [np.interp(GRID, own, values) for own, values in zip(x[rows], y[rows])]
    return grid


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
    return bands([(curves, groups)], resamples, seed)[0]


Band = tuple[np.ndarray, np.ndarray, np.ndarray]


def bands(tables: Sequence[tuple[np.ndarray, np.ndarray | None]], resamples: int = 1000, seed: int = 0) -> list[Band]:
    """`band` of many tables of curves; those of as many samples (or groups) share their draws, _BLOCK held at once."""
    clustered = [_clustered(curves, groups) for curves, groups in tables]
    drawn_means = [np.empty((resamples, curves.shape[1])) for curves, _ in tables]
    for count in {len(sizes) for _, sizes in clustered}:
        generator, block = np.random.default_rng(seed), max(1, _BLOCK // count)
        same = [place for place, (_, sizes) in enumerate(clustered) if len(sizes) == count]
        for start in range(0, resamples, block):
            rows = slice(start, min(start + block, resamples))
            drawn = generator.multinomial(count, np.full(count, 1 / count), rows.stop - rows.start).astype(float)
            for place in same:
                sums, sizes = clustered[place]
                drawn_means[place][rows] = drawn @ sums / (drawn @ sizes)[:, None]
    bounds = [np.percentile(means, [2.5, 97.5], axis=0) for means in drawn_means]
    return [(np.asarray(curves.mean(0)), low, high) for (curves, _), (low, high) in zip(tables, bounds)]


def _clustered(curves: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums (G, P) of the curves of each group, and its size (G,)."""
    if groups is None:
        return curves, np.ones(len(curves))
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), curves.shape[1]))
    for rows in blocks(len(curves)):
        np.add.at(sums, place[rows], curves[rows])
    return sums, sizes.astype(float)


def curve_panels(
    curves: Mapping[str, np.ndarray],
    explainers: list[str],
    metric: str,
    scratch_dir: Path | None = None,
    quantity: str = PROBABILITY,
) -> list[Panel]:
    """An insertion and a deletion panel of one metric, one line per explainer.

    Args:
        curves: arrays `<explainer>/<metric>/{x,insertion,deletion}`, as in `curves.npz`, and `.../group` (n,) where
            samples of a group are drawn together.
        explainers: in the order of the table, which also fixes their colours.
        metric: its name.
        scratch_dir: a folder on whose disk intermediate results lie; None: in memory.
        quantity: what the curves hold, see `StageResults.quantity`; all but probabilities have the range of the data.
    """
    y_range = UNIT if quantity == PROBABILITY else None
    lines = ("insertion", "deletion")
    keys = {name: f"{name}/{metric}" for name in explainers if f"{name}/{metric}/x" in curves}
    grids = [
        (on_grid(curves[f"{key}/x"], curves[f"{key}/{line}"], scratch_dir), curves.get(f"{key}/group"))
        for line in lines
        for key in keys.values()
    ]
    found = iter(bands(grids))
    panels = []
    for line in lines:
        series = tuple(Series(name, explainers.index(name), GRID, *next(found)) for name in keys)
        panels.append(Panel(f"{metric}: {line}", "fraction of patches", quantity, series, y_range))
    return panels


def curve_metrics(curves: Mapping[str, np.ndarray]) -> list[str]:
    """Metrics that have curves, in the order of the file."""
    return list(dict.fromkeys(name.split("/")[-2] for name in curves if name.endswith("/x")))
