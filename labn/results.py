"""The tables of a results folder: scores, means with intervals, paired differences, curves."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labn.metrics.statistics import Interval, bootstrap_mean, paired_difference
from labn.store import ResultStore, ScorePart, write_atomically

SCORES = ("split", "index", "name", "label", "target", "explainer", "metric", "value")
SUMMARY = ("explainer", "metric", "mean", "ci_low", "ci_high", "n")
PAIRED = ("explainer_a", "explainer_b", "metric", "difference", "ci_low", "ci_high", "n")
PREDICTIONS = ("split", "index", "name", "label", "prediction", "probability")
COUNTS = ("explainer", "metric", "kind", "count")
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Plan:
    """What belongs into the tables, in the order in which it is shown.

    Attributes:
        explainers: name -> digest of its arguments.
        metrics: metric -> (digest of its arguments, names of its values).
        samples: indices that are explained; what an earlier run scored beyond them stays out of the tables.
        counted: metrics that count samples -> what makes counts of the (n,) columns of their values.
    """

    explainers: dict[str, str]
    metrics: dict[str, tuple[str, tuple[str, ...]]]
    samples: frozenset[int]
    counted: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def value_names(self) -> list[str]:
        """Names of all values, each once, in order."""
        return list(dict.fromkeys(name for _, names in self.metrics.values() for name in names))

    def accepted(self, part: ScorePart) -> set[str]:
        """Names of the part's values that the present explainers and metrics made."""
        if self.explainers.get(part.explainer) != part.key:
            return set()
        return {n for m, (key, names) in self.metrics.items() if part.keys.get(m) == key for n in names}


@dataclass
class Table:
    """Values per explainer and metric: `values[explainer][metric][index]`, and what is known per sample."""

    values: dict[str, dict[str, dict[int, float]]]
    samples: dict[int, dict[str, float]]
    targets: dict[tuple[str, int], int]

    def column(self, explainer: str, metric: str) -> dict[int, float]:
        """Sample index -> value, in order of the index."""
        return dict(sorted(self.values[explainer].get(metric, {}).items()))


def collect(parts: Iterable[ScorePart], plan: Plan) -> Table:
    """Read the accepted values of all parts; a sample that was scored twice counts once."""
    table = Table({name: {} for name in plan.explainers}, {}, {})
    for part in parts:
        accepted = plan.accepted(part)
        for row, index in enumerate(part.index.tolist()):
            if index not in plan.samples:
                continue
            if accepted:
                table.samples[index] = {
                    "label": int(part.label[row]),
                    "prediction": int(part.prediction[row]),
                    "probability": float(part.probability[row]),
                }
                table.targets[part.explainer, index] = int(part.target[row])
            for name in accepted & part.values.keys():
                value = float(part.values[name][row])
                if not math.isnan(value):
                    table.values[part.explainer].setdefault(name, {}).setdefault(index, value)
    return table


Groups = dict[int, int] | None


def summarise(table: Table, plan: Plan, groups: Groups = None) -> dict[tuple[str, str], Interval]:
    """Mean and 95 % interval per explainer and value, over the samples that have it; `groups` are drawn whole."""
    return {
        (explainer, metric): bootstrap_mean(
            list(column.values()), groups=None if groups is None else [groups[index] for index in column]
        )
        for explainer, metric in itertools.product(plan.explainers, plan.value_names)
        if (column := table.column(explainer, metric))
    }


def count_rows(table: Table, plan: Plan) -> Iterator[tuple[str, str, str, int]]:
    """Rows of `counts.csv`: per explainer, what the metrics count over the samples that have all their values."""
    for explainer, (metric, reduce) in itertools.product(plan.explainers, plan.counted.items()):
        columns = {name: table.column(explainer, name) for name in plan.metrics[metric][1]}
        shared = sorted(set.intersection(*(set(column) for column in columns.values())))
        values = {n: torch.tensor([c[i] for i in shared], dtype=torch.float64) for n, c in columns.items()}
        for kind, count in reduce(values).items():
            yield explainer, metric, kind, int(count)


def compare(table: Table, plan: Plan, groups: Groups = None) -> dict[tuple[str, str, str], Interval]:
    """Paired difference a - b with its interval, for every pair of explainers and every value."""
    found = {}
    for (a, b), metric in itertools.product(itertools.combinations(plan.explainers, 2), plan.value_names):
        first, second = table.column(a, metric), table.column(b, metric)
        if first.keys() & second.keys():
            found[a, b, metric] = paired_difference(
                list(first), list(first.values()), list(second), list(second.values()), groups=groups
            )
    return found


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows as CSV; floats with all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([repr(v) if isinstance(v, float) else v for v in row] for row in rows)
    return text.getvalue().encode()


def score_rows(table: Table, plan: Plan, split: str, sample_name: Callable[[int], str]) -> Iterator[tuple[Any, ...]]:
    """Rows of `scores.csv`, sorted by sample, explainer and metric."""
    for index, explainer, metric in itertools.product(sorted(table.samples), plan.explainers, plan.value_names):
        value = table.values[explainer].get(metric, {}).get(index)
        if value is not None:
            label, target = table.samples[index]["label"], table.targets[explainer, index]
            yield split, index, sample_name(index), label, target, explainer, metric, value


def predictions(table: Table, split: str, sample_name: Callable[[int], str], groups: Groups) -> bytes:
    """`predictions.csv`: one row per explained sample, with its group where there are groups."""
    header = PREDICTIONS if groups is None else (*PREDICTIONS, "group")
    rows = (
        (split, index, sample_name(index), *sample.values(), *([] if groups is None else [groups[index]]))
        for index, sample in sorted(table.samples.items())
    )
    return csv_bytes(header, rows)


def stacked_curves(parts: Iterable[ScorePart], plan: Plan) -> dict[str, np.ndarray]:
    """Arrays `<explainer>/<metric>/{index,x,insertion,deletion}`, rows sorted by sample index."""
    rows: dict[tuple[str, str], dict[int, list[np.ndarray]]] = {}
    for part in parts:
        for metric, (key, _) in plan.metrics.items():
            known = plan.explainers.get(part.explainer) == part.key and part.keys.get(metric) == key
            if known and f"{metric}/x" in part.curves:
                lines = [part.curves[f"{metric}/{name}"] for name in ("index", "x", "insertion", "deletion")]
                entries = rows.setdefault((part.explainer, metric), {})
                entries.update({int(line[0]): list(line[1:]) for line in zip(*lines) if int(line[0]) in plan.samples})
    arrays = {}
    for (explainer, metric), entries in rows.items():
        if not entries:
            continue
        order = sorted(entries)
        arrays[f"{explainer}/{metric}/index"] = np.array(order)
        for place, name in enumerate(("x", "insertion", "deletion")):
            arrays[f"{explainer}/{metric}/{name}"] = np.stack([entries[index][place] for index in order])
    return arrays


def write_results(
    store: ResultStore,
    plan: Plan,
    split: str,
    sample_name: Callable[[int], str],
    manifest: dict[str, Any],
    groups: Groups = None,
) -> dict[tuple[str, str], Interval]:
    """Merge all parts into the tables of the results folder; rank zero calls it.

    Args:
        store: the folder, with the parts of all ranks.
        plan: what belongs into the tables.
        split: name of the split.
        sample_name: sample index -> name.
        manifest: what else the manifest says (explainer arguments, hashes).
        groups: sample index -> group, where samples are not independent; intervals draw whole groups.

    Returns:
        (explainer, value) -> mean and interval, as in `summary.csv`.
    """
    store.refresh()
    parts = store.parts()
    table = collect(parts, plan)
    summary, pairs = summarise(table, plan, groups), compare(table, plan, groups)
    write_atomically(store.folder / "scores.csv", csv_bytes(SCORES, score_rows(table, plan, split, sample_name)))
    rows = ((*key, i.mean, i.low, i.high, i.n) for key, i in summary.items())
    write_atomically(store.folder / "summary.csv", csv_bytes(SUMMARY, rows))
    differences = ((*pair, i.mean, i.low, i.high, i.n) for pair, i in pairs.items())
    write_atomically(store.folder / "paired.csv", csv_bytes(PAIRED, differences))
    if plan.counted:
        write_atomically(store.folder / "counts.csv", csv_bytes(COUNTS, count_rows(table, plan)))
    write_atomically(store.folder / "predictions.csv", predictions(table, split, sample_name, groups))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stacked_curves(parts, plan))  # type: ignore[arg-type]
    write_atomically(store.folder / "curves.npz", buffer.getvalue())
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    manifest = {**manifest, "versions": versions, "samples": len(table.samples)}
    write_atomically(store.folder / "maps" / "manifest.json", json.dumps(manifest, indent=1, default=str).encode())
    return summary


def summary_table(summary: dict[tuple[str, str], Interval], names: Sequence[str]) -> str:
    """The means with their intervals as plain text: one line per explainer, one column per value."""
    explainers = list(dict.fromkeys(explainer for explainer, _ in summary))
    cells = [["", *names]]
    for explainer in explainers:
        found = [summary.get((explainer, name)) for name in names]
        cells.append([explainer, *(f"{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]" if i else "-" for i in found)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    return "\n".join(lines)
