"""Merge score shards into the tables of a results folder: scores, means with intervals, paired differences, curves.

Tables may be larger than memory: values lie in memory-mapped arrays and are read and written block by block.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from labn.io.atomic import write_atomically, written_atomically
from labn.io.digits import decimals
from labn.io.memmap import Stored, blocks, temporary_memmap, write_npz
from labn.io.table_cells import write_csv
from labn.metrics.comparisons import Difference, Rank, Value, compare_values
from labn.metrics.intervals import Interval
from labn.metrics.registry import describe_value
from labn.metrics.sample_table import SampleTable
from labn.results.score_files import ScoreBlock, has_pyarrow, write_score_csv, write_score_parquet
from labn.results.store import MANIFEST, ResultStore, ScoreShard

BASELINES = ("random", "constant")
"""Methods that do not look at the image, in every table for comparison."""
FEW = 9
"""Number of samples, or groups, below which intervals are noticeably too narrow (`tests/benchmarks/intervals.py`)."""
NEGLIGIBLE = 0.01
"""PID, or a difference of PID, in probabilities, below which a ranking of methods means next to nothing."""
INSERTION_DELETION = re.compile(r"(id|pid\d+)(@(?:official|stable|random|threshold))?")
"""Names of the values that are the area between an insertion and a deletion curve."""
SUMMARY = ("explainer", "metric", "mean", "ci_low", "ci_high", "n")

PAIRED = ("explainer_a", "explainer_b", "metric", "difference", "ci_low", "ci_high", "n", "p", "p_adjusted")

RANKS = ("explainer", "metric", "rank", "rank_low", "rank_high", "p_best", "n")

PREDICTIONS = ("split", "index", "name", "label", "prediction", "probability")

COUNTS = ("explainer", "metric", "kind", "count")

LINES = ("x", "insertion", "deletion")

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Plan:
    """Content of the tables, in the order of display.

    Attributes:
        explainers: name -> hash of its arguments.
        metrics: metric -> (hash of its arguments, names of its values).
        samples: indices of the explained samples; scores of other samples, from an earlier run, are left out.
        counted: metric that counts samples -> function from the (n,) columns of its values to counts.
    """

    explainers: dict[str, str]
    metrics: dict[str, tuple[str, tuple[str, ...]]]
    samples: frozenset[int]
    counted: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def value_names(self) -> list[str]:
        """Names of all values, each once, in order."""
        return list(dict.fromkeys(name for _, names in self.metrics.values() for name in names))

    def accepted(self, shard: ScoreShard) -> set[str]:
        """Names of the shard's values whose explainer and metric have the arguments of this plan."""
        if self.explainers.get(shard.explainer) != shard.key:
            return set()
        return {n for m, (key, names) in self.metrics.items() if shard.keys.get(m) == key for n in names}


class Table:
    """Values per sample, explainer and metric, with label and prediction per sample.

    Args:
        plan: explainers, metrics and samples of the table.
        folder: folder for the memory-mapped values; None keeps them in memory.

    Attributes:
        index: (S,) int64 sample indices of the plan, sorted.
        seen: (S,) bool, whether a score shard contains the sample.
        facts: `label`, `prediction` (S,) int64 and `probability` (S,) float64.
        targets: explainer -> (S,) int64 explained classes.
        values: (C, S) float64, one row per pair of explainer and value; NaN if a sample has no value.
    """

    def __init__(self, plan: Plan, folder: Path | None = None) -> None:
        self.index = np.array(sorted(plan.samples), dtype=np.int64)
        size = len(self.index)
        pairs = itertools.product(plan.explainers, plan.value_names)
        self._columns = {pair: number for number, pair in enumerate(pairs)}
        self.seen = np.zeros(size, dtype=bool)
        kinds = {"label": np.int64, "prediction": np.int64, "probability": np.float64}
        self.facts: dict[str, np.ndarray] = {name: np.zeros(size, kind) for name, kind in kinds.items()}
        self.targets = {name: np.zeros(size, dtype=np.int64) for name in plan.explainers}
        self.values = temporary_memmap((len(self._columns), size), np.float64, folder)
        for block in blocks(size):
            self.values[:, block] = np.nan
        self._merged = SampleTable(self.index, len(self._columns), self.values)

    def add(self, shard: ScoreShard, accepted: set[str]) -> None:
        """Add the accepted values of a shard; of a sample that was scored twice the first value counts."""
        positions, in_shard = self._merged.positions(shard.index)
        self.seen[positions] = True
        for name, column in self.facts.items():
            column[positions] = getattr(shard, name)[in_shard]
        self.targets[shard.explainer][positions] = shard.target[in_shard]
        names = accepted & shard.values.keys()
        self._merged.add(shard.index, {self._columns[shard.explainer, n]: shard.values[n] for n in names})

    def column(self, explainer: str, metric: str) -> np.ndarray:
        """(S,) values in the order of `index`; NaN if a sample has no value."""
        return np.asarray(self.values[self._columns[explainer, metric]])

    def methods(self, metric: str) -> Tensor:
        """(S, M) values of all explainers, a copy."""
        numbers = [number for (_, name), number in self._columns.items() if name == metric]
        return torch.from_numpy(np.stack([self.values[number] for number in numbers], axis=1))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(explainer, value) of every row of `values`."""
        return list(self._columns)

    def blocks(self, sample_name: Callable[[int], str]) -> Iterator[ScoreBlock]:
        """The scores of all samples in the order of `index`, some samples at a time."""
        for block in blocks(len(self.index)):
            index = self.index[block]
            names = [sample_name(number) for number in index.tolist()]
            targets = np.empty((len(self.pairs), len(index)), dtype=np.int64)
            for row, (explainer, _) in zip(targets, self.pairs):
                row[:] = self.targets[explainer][block]
            yield ScoreBlock(index, names, self.facts["label"][block], targets, np.asarray(self.values[:, block]))


def collect(shards: Iterable[ScoreShard], plan: Plan, folder: Path | None = None) -> Table:
    """A table with the accepted values of all shards; only one shard is in memory at a time."""
    table = Table(plan, folder)
    for shard in shards:
        accepted = plan.accepted(shard)
        # Without metrics a shard has no values, but its predictions are needed.
        if accepted or (not plan.metrics and plan.explainers.get(shard.explainer) == shard.key):
            table.add(shard, accepted)
    return table


Groups = dict[int, int] | None
Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Statistics:
    """What follows from a table of scores, in the order of the tables.

    Attributes:
        means: (explainer, value) -> mean and 95 % bootstrap interval over the samples with that value.
        differences: (a, b, value) -> mean difference a - b over the samples of both, for every pair of explainers.
        ranks: (explainer, value) -> rank among the explainers, for values with a better end.
    """

    means: dict[tuple[str, str], Interval]
    differences: dict[tuple[str, str, str], Difference]
    ranks: dict[tuple[str, str], Rank]


def statistics_of(table: Table, plan: Plan, groups: Groups = None) -> Statistics:
    """The statistics of a table.

    Args:
        table: the scores.
        plan: explainers and values.
        groups: sample index -> group, resampled as a whole; None resamples single samples.
    """
    drawn = None if groups is None else torch.tensor([groups.get(i, -1) for i in table.index.tolist()])
    return compare_methods(list(plan.explainers), plan.value_names, table.methods, drawn)


def compare_methods(
    explainers: Sequence[str], names: Sequence[str], columns: Callable[[str], Tensor], groups: Tensor | None = None
) -> Statistics:
    """The statistics of columns of scores.

    Args:
        explainers: the M methods.
        names: names of the values.
        columns: value -> (N, M) float64 scores, NaN where a sample has none.
        groups: (N,) int64 groups of samples, resampled as a whole; None resamples single samples.
    """
    values = (Value(columns(name), describe_value(name).sign, groups) for name in names)
    compared = dict(zip(names, compare_values(values)))
    own = list(itertools.product(enumerate(explainers), names))
    pairs = list(itertools.product(itertools.combinations(enumerate(explainers), 2), names))
    means = {(e, name): compared[name].intervals[i] for (i, e), name in own}
    differences = {(a, b, name): compared[name].differences.get((i, j)) for ((i, a), (j, b)), name in pairs}
    ranks = {(e, name): compared[name].ranks[i] for (i, e), name in own}
    return Statistics(_present(means), _present(differences), _present(ranks))


def _present(found: dict[Key, Found | None]) -> dict[Key, Found]:
    return {key: value for key, value in found.items() if value is not None}


def count_rows(table: Table, plan: Plan) -> Iterator[tuple[str, str, str, int]]:
    """Rows of `counts.csv`: per explainer, the counts of the metrics over the samples with all values of the metric."""
    for explainer, (metric, reduce) in itertools.product(plan.explainers, plan.counted.items()):
        columns = {name: torch.from_numpy(np.array(table.column(explainer, name))) for name in plan.metrics[metric][1]}
        # A sample enters the counts only if every value of the metric is there.
        shared = ~torch.stack(list(columns.values())).isnan().any(0)
        for kind, count in reduce({name: column[shared] for name, column in columns.items()}).items():
            yield explainer, metric, kind, int(count)


def write_scores(folder: Path, table: Table, split: str, sample_name: Callable[[int], str]) -> None:
    """Write `scores.csv`, and `scores.parquet` where pyarrow is installed."""
    write_score_csv(folder / "scores.csv", split, table.pairs, table.blocks(sample_name))
    if has_pyarrow():
        write_score_parquet(folder / "scores.parquet", split, table.pairs, table.blocks(sample_name))


def prediction_rows(
    table: Table, split: str, sample_name: Callable[[int], str], groups: Groups
) -> Iterator[tuple[Any, ...]]:
    """Rows of `predictions.csv`: one per explained sample, with its group if samples have groups."""
    for position in np.flatnonzero(table.seen).tolist():
        index = int(table.index[position])
        facts = [column[position].item() for column in table.facts.values()]
        yield split, index, sample_name(index), *facts, *([] if groups is None else [groups[index]])


class Curves:
    """Insertion and deletion curves of all samples, collected from score shards.

    Args:
        plan: explainers, metrics and samples.
        folder: folder for the memory-mapped curves; None keeps them in memory.
    """

    def __init__(self, plan: Plan, folder: Path | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.index = np.array(sorted(plan.samples), dtype=np.int64)
        self._lines: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self._seen: dict[tuple[str, str], np.ndarray] = {}

    def add(self, shard: ScoreShard) -> None:
        """Add the curves of a shard whose explainer and metric have the arguments of the plan."""
        for metric, (key, _) in self.plan.metrics.items():
            matches = self.plan.explainers.get(shard.explainer) == shard.key and shard.keys.get(metric) == key
            if matches and f"{metric}/x" in shard.curves:
                self._add(shard, metric)

    def _add(self, shard: ScoreShard, metric: str) -> None:
        positions, in_shard = SampleTable(self.index, 0).positions(shard.curves[f"{metric}/index"])
        pair = shard.explainer, metric
        for line in LINES:
            curve = shard.curves[f"{metric}/{line}"]
            # The number of points is known only when the first shard arrives.
            if line not in self._lines.setdefault(pair, {}):
                shape = (len(self.index), *curve.shape[1:])
                self._lines[pair][line] = temporary_memmap(shape, curve.dtype, self.folder)
            self._lines[pair][line][positions] = curve[in_shard]
        self._seen.setdefault(pair, np.zeros(len(self.index), dtype=bool))[positions] = True

    def arrays(self) -> Iterator[Stored]:
        """Arrays `<explainer>/<metric>/{index,x,insertion,deletion}` in the form that `write_npz` takes."""
        for (explainer, metric), seen in self._seen.items():
            positions = np.flatnonzero(seen)
            if not len(positions):
                continue
            start = f"{explainer}/{metric}"
            yield f"{start}/index", (len(positions),), self.index.dtype, [self.index[positions]]
            for line, curves in self._lines[explainer, metric].items():
                rows = (curves[positions[block]] for block in blocks(len(positions)))
                yield f"{start}/{line}", (len(positions), *curves.shape[1:]), curves.dtype, rows


def _streamed(shards: Iterable[ScoreShard], curves: Curves) -> Iterator[ScoreShard]:
    """The shards, whose curves are collected in passing: every shard is read from disk once."""
    for shard in shards:
        curves.add(shard)
        yield shard


def write_results(
    store: ResultStore,
    plan: Plan,
    split: str,
    sample_name: Callable[[int], str],
    manifest: dict[str, Any],
    groups: Groups = None,
    scored: int | None = None,
) -> tuple[dict[tuple[str, str], Interval], dict[tuple[str, str, str], Difference]]:
    """Merge all score shards into the tables of the results folder; called by rank zero.

    Args:
        store: the results folder with the shards of all ranks.
        plan: explainers, metrics and samples of the tables.
        split: name of the split.
        sample_name: sample index -> name.
        manifest: further content of the manifest (explainer arguments, hashes).
        groups: sample index -> group, for samples that are not independent; the bootstrap resamples whole groups.
        scored: number of samples that all ranks together have scored; a warning tells if the folder has fewer.

    Returns:
        (explainer, value) -> mean and interval, as in `summary.csv`; and (a, b, value) -> the same of the difference
        a - b, as in `paired.csv`.
    """
    store.check_not_removed()
    curves = Curves(plan, store.folder)
    table = collect(_streamed(store.score_shards(), curves), plan, store.folder)
    write_scores(store.folder, table, split, sample_name)
    statistics = statistics_of(table, plan, groups)
    _write_statistics(store.folder, statistics)
    if plan.counted:
        write_csv(store.folder / "counts.csv", COUNTS, count_rows(table, plan))
    header = PREDICTIONS if groups is None else (*PREDICTIONS, "group")
    write_csv(store.folder / "predictions.csv", header, prediction_rows(table, split, sample_name, groups))
    with written_atomically(store.folder / "curves.npz") as file:
        write_npz(file, curves.arrays())
    written = int(table.seen.sum())
    write_manifest(store.folder, {**manifest, "samples": written})
    # Ranks on several nodes must share the run folder; without a shared file system their shards are missing here.
    if plan.metrics and scored is not None and written < (expected := min(scored, len(plan.samples))):
        warnings.warn(
            f"{store.folder}: the tables lack {expected - written} of {expected} scored samples; a process wrote to a "
            "folder that rank zero does not see, or had other settings.",
            stacklevel=2,
        )
    return statistics.means, statistics.differences


def _write_statistics(folder: Path, statistics: Statistics) -> None:
    rows = ((*key, i.mean, i.low, i.high, i.n) for key, i in statistics.means.items())
    write_csv(folder / "summary.csv", SUMMARY, rows)
    differences = statistics.differences.items()
    pairs = ((*pair, d.mean, d.low, d.high, d.n, d.p, d.p_adjusted) for pair, d in differences)
    write_csv(folder / "paired.csv", PAIRED, pairs)
    ranks = ((*key, r.rank, r.low, r.high, r.p_best, r.n) for key, r in statistics.ranks.items())
    write_csv(folder / "ranks.csv", RANKS, ranks)


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write `maps/manifest.json`: the given facts, and the versions of Python and the main packages."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    text = json.dumps({**facts, "versions": versions}, indent=1, default=str)
    write_atomically(folder / MANIFEST, text.encode())


def summary_table(summary: Mapping[tuple[str, str], Interval], names: Sequence[str], width: int | None = None) -> str:
    """Means and intervals as plain text: one line per explainer, one column per value.

    Args:
        summary: (explainer, value) -> mean and interval.
        names: names of the values.
        width: characters of a line; the intervals are left out if the table would be wider. None: any.
    """
    table = _summary_table(summary, names, bracketed=True)
    fits = width is None or max(map(len, table.splitlines())) <= width
    return table if fits else _summary_table(summary, names, bracketed=False)


def _summary_table(summary: Mapping[tuple[str, str], Interval], names: Sequence[str], bracketed: bool) -> str:
    explainers = list(dict.fromkeys(explainer for explainer, _ in summary))
    cells = [["", *names]]
    for explainer in explainers:
        intervals = [summary.get((explainer, name)) for name in names]
        cells.append([explainer, *(_cell(interval, bracketed) for interval in intervals)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    return "\n".join(lines)


def _cell(interval: Interval | None, bracketed: bool) -> str:
    return "-" if interval is None else f"{decimals(interval.mean)}{interval.bracketed if bracketed else ''}"


def reading(
    summary: Mapping[tuple[str, str], Interval], pairs: Mapping[tuple[str, str, str], Interval], name: str
) -> str:
    """What a column of PID says: what 0 is, what `random` got, and whether the best method beats it by more than
    next to nothing (`NEGLIGIBLE`).

    Args:
        summary: (explainer, value) -> mean and interval.
        pairs: (a, b, value) -> mean and interval of the difference a - b.
        name: name of the value, such as `pid16`.

    Returns:
        One or two sentences; empty for other values than PID, and without `random` or any other method.

    Example:
        >>> means = {("gradcam", "id"): Interval(0.4, 0.3, 0.5, 20), ("random", "id"): Interval(0.0, -0.1, 0.1, 20)}
        >>> said = reading(means, {("gradcam", "random", "id"): Interval(0.4, 0.2, 0.6, 20)}, "id")
        >>> print(*said.split("; "), sep=chr(10))
        id: a map without information gets 0 (random: 0.000 [-0.100, 0.100])
        gradcam is best with 0.400 and beats random by 0.400 [0.200, 0.600].
    """
    means = {explainer: interval for (explainer, value), interval in summary.items() if value == name}
    methods = {e: i.mean for e, i in means.items() if e not in BASELINES and not math.isnan(i.mean)}
    kind = INSERTION_DELETION.fullmatch(name)
    if kind is None or kind[2] or "random" not in means or not methods:
        return ""
    random, best = means["random"], max(methods, key=methods.__getitem__)
    start = f"{name}: a map without information gets 0 (random: {decimals(random.mean)}{random.bracketed}); "
    difference = pairs.get((best, "random", name))
    return (
        f"{start}{_verdict(best, methods[best], difference)}{_negligible([*methods.values(), random.mean], difference)}"
    )


def _verdict(best: str, mean: float, difference: Interval | None) -> str:
    """Whether the best method beats `random`, given its mean and its difference to `random`."""
    if difference is None or math.isnan(difference.low):
        return f"{best} is best with {decimals(mean)}; too few samples say whether it beats random."
    by = f"{decimals(difference.mean)}{difference.bracketed}"
    if difference.low > 0 and difference.n < FEW:
        few = f"{difference.n} samples are too few to be sure."
        return f"{best} is best with {decimals(mean)}, ahead of random by {by}; {few}"
    if difference.low > 0:
        return f"{best} is best with {decimals(mean)} and beats random by {by}."
    return f"no method beats random: {best}, the best, differs from it by {by}."


def _negligible(means: Sequence[float], difference: Interval | None) -> str:
    """A sentence for means that are all next to nothing, or a lead over `random` that is; else an empty string."""
    if max(map(abs, means)) < NEGLIGIBLE:
        return (
            f" Less than {NEGLIGIBLE} is next to nothing (flat curves): the network's answer hardly depends on which "
            "pixels are taken away."
        )
    small = difference is not None and abs(difference.mean) < NEGLIGIBLE
    return f" A difference below {NEGLIGIBLE} is next to nothing." if small else ""
