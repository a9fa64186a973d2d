"""Mean insertion and deletion curves with bootstrap bands, from the curves of all samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from labn.io.memmap import blocks, temporary_memmap
from labn.metrics.intervals import FEW
from labn.metrics.statistics import mean_table
from labn.report.charts import Panel, Series

GRID = np.linspace(0, 1, 101)
PROBABILITY, UNIT = "probability", (0.0, 1.0)
_BLOCK = 1 << 22  # multinomial counts in memory at once, 32 MB


def on_grid(x: np.ndarray, y: np.ndarray, scratch_dir: Path | None = None) -> np.ndarray:
    """Curves interpolated linearly at the 101 points of `GRID`.

    Args:
        x: (n, K) abscissae in [0, 1], increasing.
        y: (n, K) ordinates.
        scratch_dir: folder for a memory-mapped result; None keeps it in memory.

    Returns:
        (n, 101) float64.
    """
    grid = temporary_memmap((len(x), len(GRID)), np.float64, scratch_dir)
    for rows in blocks(len(x)):
        grid[rows] = [np.interp(GRID, own, values) for own, values in zip(x[rows], y[rows])]
    return grid


def band(
    curves: np.ndarray, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over samples and its pointwise 95 % bootstrap interval: for few samples or groups BCa, else percentiles.

    Args:
        curves: (n, P).
        groups: (n,) integers; samples of one group are resampled together. None: every sample is its own group.
        resamples: number of resamples.
        seed: seed of the generator; equal input gives equal digits.

    Returns:
        Mean, lower and upper bound, each (P,).
    """
    return bands([(curves, groups)], resamples, seed)[0]


Band = tuple[np.ndarray, np.ndarray, np.ndarray]


def bands(tables: Sequence[tuple[np.ndarray, np.ndarray | None]], resamples: int = 1000, seed: int = 0) -> list[Band]:
    """`band` of many tables of curves (n, P) with their groups (n,) or None.

    Tables with the same number of groups share the drawn resamples.
    """
    units = [len(curves) if groups is None else len(np.unique(groups)) for curves, groups in tables]
    many = iter(_percentile_bands([table for table, count in zip(tables, units) if count >= FEW], resamples, seed))
    return [next(many) if n >= FEW else _band_of_few(*table, resamples, seed) for table, n in zip(tables, units)]


def _band_of_few(curves: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int) -> Band:
    table = mean_table(torch.tensor(curves, dtype=torch.float64), None if groups is None else torch.from_numpy(groups))
    low, high = table.bounds(table.resampled(resamples, seed), level=0.95)
    # One sample or group has no interval: its band is the line.
    low, high = (bound.where(~bound.isnan(), table.means) for bound in (low, high))
    return np.asarray(curves.mean(0)), low.numpy(), high.numpy()


def _percentile_bands(
    tables: Sequence[tuple[np.ndarray, np.ndarray | None]], resamples: int, seed: int
) -> Iterator[Band]:
    clustered = [_clustered(curves, groups) for curves, groups in tables]
    drawn_means = [np.empty((resamples, curves.shape[1])) for curves, _ in tables]
    for count in {len(sizes) for _, sizes in clustered}:
        # A generator per number of groups, so that a band does not depend on the other tables.
        generator, block = np.random.default_rng(seed), max(1, _BLOCK // count)
        same = [number for number, (_, sizes) in enumerate(clustered) if len(sizes) == count]
        for start in range(0, resamples, block):
            rows = slice(start, min(start + block, resamples))
            # How often each group is drawn suffices: the means of all resamples are then one matrix product.
            drawn = generator.multinomial(count, np.full(count, 1 / count), rows.stop - rows.start).astype(float)
            for number in same:
                sums, sizes = clustered[number]
                # Divided by the number of drawn samples, not groups: groups have different sizes.
                drawn_means[number][rows] = drawn @ sums / (drawn @ sizes)[:, None]
    bounds = [np.percentile(means, [2.5, 97.5], axis=0) for means in drawn_means]
    yield from ((np.asarray(curves.mean(0)), low, high) for (curves, _), (low, high) in zip(tables, bounds))


def _clustered(curves: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Per group, the sum of its curves (G, P) and its number of samples (G,)."""
    if groups is None:
        return curves, np.ones(len(curves))
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), curves.shape[1]))
    for rows in blocks(len(curves)):
        np.add.at(sums, number[rows], curves[rows])
    return sums, sizes.astype(float)


def curve_panels(
    curves: Mapping[str, np.ndarray],
    explainers: list[str],
    metric: str,
    scratch_dir: Path | None = None,
    quantity: str = PROBABILITY,
) -> list[Panel]:
    """An insertion and a deletion panel of one metric, with one line per explainer.

    Args:
        curves: arrays `<explainer>/<metric>/{x,insertion,deletion}`, as in `curves.npz`, and `.../group` (n,) if whole
            groups of samples are resampled.
        explainers: names in the order of the table, which determines the colours.
        metric: name of the metric.
        scratch_dir: folder for memory-mapped intermediate arrays; None keeps them in memory.
        quantity: quantity of the curves, see `StageResults.quantity`; the y axis of probabilities is [0, 1].
    """
    y_range = UNIT if quantity == PROBABILITY else None
    lines = ("insertion", "deletion")
    keys = {name: f"{name}/{metric}" for name in explainers if f"{name}/{metric}/x" in curves}
    grids = [
        (on_grid(curves[f"{key}/x"], curves[f"{key}/{line}"], scratch_dir), curves.get(f"{key}/group"))
        for line in lines
        for key in keys.values()
    ]
    all_bands = iter(bands(grids))
    panels = []
    for line in lines:
        series = tuple(Series(name, explainers.index(name), GRID, *next(all_bands)) for name in keys)
        panels.append(Panel(f"{metric}: {line}", "fraction of patches", quantity, series, y_range))
    return panels


def curve_metrics(curves: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the metrics with curves, in the order of the file."""
    return list(dict.fromkeys(name.split("/")[-2] for name in curves if name.endswith("/x")))
