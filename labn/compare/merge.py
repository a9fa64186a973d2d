"""Merge the scores of several runs sample by sample, after a check that the runs are comparable."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from labn.compare.runs import Run
from labn.errors import InputError
from labn.metrics.comparisons import Difference, Rank, Value, compare_values
from labn.metrics.intervals import Interval
from labn.metrics.registry import describe_value

Column = dict[str, float]
"""Sample name -> value."""
IGNORED = ("chunk_size", "fold")
"""Settings that change the speed of a computation but not its result."""


@dataclass(frozen=True)
class Row:
    """One value of one method, over all seeds of a run.

    Attributes:
        label: label of the run.
        explainer: name of the method.
        metric: name of the value.
        interval: mean over samples of the means over seeds, with its 95 % bootstrap interval over samples (or whole
            groups of samples); the bounds are NaN for one sample or one group.
        networks: hash of a network's weights -> its mean over the samples, one per seed.
    """

    label: str
    explainer: str
    metric: str
    interval: Interval
    networks: dict[str, float]

    @property
    def seeds(self) -> int:
        """Number of trained networks."""
        return len(self.networks)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) of the networks' means; None for one network."""
        return statistics.stdev(self.networks.values()) if len(self.networks) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """The merged scores of several runs.

    Attributes:
        runs: the runs, in the order of the arguments.
        columns: (label, explainer, metric) -> sample name -> mean over seeds.
        rows: the rows of the table.
        paired: (first, second, metric, first - second); both names as `row_name` gives them.
        ranks: (row, metric, rank among the rows), for requested values with a better end.
        left_out: metric -> number of samples that are left out because not every row has them.
        asked: names of the values that were requested when the runs were scored, and `fill_probability`.
        groups: sample name -> group, for samples that are not independent; None if they are independent.
    """

    runs: list[Run]
    columns: dict[tuple[str, str, str], Column]
    rows: list[Row]
    paired: list[tuple[str, str, str, Difference]]
    ranks: list[tuple[str, str, Rank]]
    left_out: dict[str, int]
    asked: list[str]
    groups: dict[str, int] | None

    def groups_of(self, names: Iterable[str]) -> list[int] | None:
        """Groups of the samples for the bootstrap; None if single samples are resampled."""
        return None if self.groups is None else [self.groups[name] for name in names]

    def row_name(self, label: str, explainer: str) -> str:
        """Name of a row: the method, preceded by the label if there are several labels."""
        return explainer if len({run.label for run in self.runs}) == 1 else f"{label}: {explainer}"


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Merge runs into one table over their common samples, matched by name.

    Raises:
        InputError: the runs differ in data, split, protocol or explained class, runs of one label have methods of one
            name with different arguments, one network has different scores in two folders, or no sample is common.
    """
    runs = list(runs)
    check_comparable(runs)
    seeds = _by_seed(runs)
    asked = list(dict.fromkeys([name for run in runs for name in run.results.headline]))
    names = _common_names(seeds)
    left_out = {m: n for m, n in ((m, _missing(seeds, m, common)) for m, common in names.items()) if n}
    comparison = Comparison(runs, {}, [], [], [], left_out, asked, _groups(runs))
    for (label, explainer, metric), networks in seeds.items():
        if len(networks) != (expected := len({run.checkpoint for run in runs if run.label == label})):
            raise InputError(
                f"{label}: only {len(networks)} of its {expected} networks have {metric} of {explainer}; score all "
                "networks with the same metrics, or give the runs different labels (LABEL=RUN)."
            )
        common = names[metric]
        # First over seeds, then over samples: the interval is over samples, seeds are reported by their deviation.
        means = {name: statistics.fmean(column[name] for column in networks.values()) for name in common}
        comparison.columns[label, explainer, metric] = means
    _add_statistics(comparison, seeds)
    return comparison


def _add_statistics(comparison: Comparison, seeds: dict[tuple[str, str, str], dict[str, Column]]) -> None:
    """Add the rows of the table, the differences and the ranks; all rows of a metric share their draws."""
    rows: dict[str, list[tuple[str, str]]] = {metric: [] for metric in comparison.asked}
    for label, explainer, metric in comparison.columns:
        rows.setdefault(metric, []).append((label, explainer))
    found: dict[tuple[str, str, str], Row] = {}
    for (metric, own), compared in zip(rows.items(), compare_values(_values(comparison, rows))):
        for (label, explainer), interval in zip(own, compared.intervals):
            assert interval is not None  # every column has a sample, see _common_names
            key = label, explainer, metric
            common = comparison.columns[key]
            means = {
                network: statistics.fmean(column[name] for name in common) for network, column in seeds[key].items()
            }
            found[key] = Row(*key, interval, means)
        if metric in comparison.asked:
            names = [comparison.row_name(*row) for row in own]
            comparison.paired.extend((names[a], names[b], metric, d) for (a, b), d in compared.differences.items())
            comparison.ranks.extend((name, metric, rank) for name, rank in zip(names, compared.ranks) if rank)
    comparison.rows.extend(found[key] for key in comparison.columns)


def _values(comparison: Comparison, rows: dict[str, list[tuple[str, str]]]) -> Iterator[Value]:
    """The columns of every metric, side by side."""
    for metric, own in rows.items():
        columns = [comparison.columns[label, explainer, metric] for label, explainer in own]
        names = list(columns[0]) if columns else []
        groups = comparison.groups_of(names)
        values = torch.tensor([[column[name] for column in columns] for name in names], dtype=torch.float64)
        drawn = None if groups is None else torch.tensor(groups)
        yield Value(values.view(len(names), len(columns)), describe_value(metric).sign, drawn)


def _by_seed(runs: Sequence[Run]) -> dict[tuple[str, str, str], dict[str, Column]]:
    """(label, explainer, metric) -> checkpoint -> sample name -> value; folders of one network are merged."""
    merged: dict[tuple[str, str, str], dict[str, Column]] = {}
    for run in runs:
        for (explainer, metric), scores in run.results.scores.items():
            networks = merged.setdefault((run.label, explainer, metric), {})
            column = networks.setdefault(run.checkpoint, {})
            for index, value in scores.items():
                name = run.results.names[index]
                # A tolerance, because the last digits depend on the chunk size and the machine.
                if not math.isclose(column.setdefault(name, value), value, rel_tol=1e-4, abs_tol=1e-5):
                    raise InputError(
                        f"{run.results.folder}: {metric} of {explainer} for {name} is {value}, but {column[name]} in "
                        "another folder of the same network; give the two folders different labels (LABEL=RUN)."
                    )
    return merged


def _groups(runs: Sequence[Run]) -> dict[str, int] | None:
    """Sample name -> group over all runs; None if the runs have no groups; raises if they disagree."""
    if runs[0].results.groups is None:
        return None
    groups: dict[str, int] = {}
    for run in runs:
        for index, name in run.results.names.items():
            group = (run.results.groups or {})[index]
            if groups.setdefault(name, group) != group:
                raise InputError(
                    f"{run.results.folder}: {name} is in group {group}, but in group {groups[name]} in another run; "
                    "test both again with the same data module."
                )
    return groups


def _common_names(seeds: dict[tuple[str, str, str], dict[str, Column]]) -> dict[str, list[str]]:
    """Metric -> names of the samples that all rows and seeds with this metric have, in the order of the first."""
    names: dict[str, list[str]] = {}
    for (_, _, metric), networks in seeds.items():
        for column in networks.values():
            # Matched by name, because indices differ between data modules that leave out different samples.
            names[metric] = [name for name in names.get(metric, column) if name in column]
    for metric, common in names.items():
        if not common:
            raise InputError(f"{metric}: no sample is common to all runs; explain the same samples in each.")
    return names


def _missing(seeds: dict[tuple[str, str, str], dict[str, Column]], metric: str, common: list[str]) -> int:
    every = {n for key, networks in seeds.items() if key[2] == metric for column in networks.values() for n in column}
    return len(every) - len(common)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise if runs must not be put into one table.

    Raises:
        InputError: the runs differ in data, split, protocol or explained class, or runs of one label have methods of
            one name with different arguments.
    """
    for run in runs[1:]:
        _check_protocol(runs[0], run)
    for first, other in itertools.combinations(runs, 2):
        if first.label == other.label:
            _check_methods(first, other)


def _check_protocol(first: Run, other: Run) -> None:
    """Raise if two runs have different data or protocols."""
    a, b = first.results.manifest, other.results.manifest
    for key, meaning in (("data", "data"), ("split", "split"), ("target", "explained class")):
        _check_equal(first, other, meaning, a.get(key), b.get(key))
    presence = ["missing" if run.results.groups is None else "present" for run in (first, other)]
    _check_equal(first, other, "the column 'group' of predictions.csv", *presence)
    settings_a, settings_b = a.get("settings", {}), b.get("settings", {})
    for name in dict.fromkeys([*settings_a, *settings_b]):
        if name not in IGNORED:
            _check_equal(first, other, f"protocol ({name})", settings_a.get(name), settings_b.get(name))
    # Only metrics that both runs have scored: the source of any other does not enter the table.
    sources_a, sources_b = a.get("sources", {}), b.get("sources", {})
    for name in (name for name in sources_a if name in sources_b):
        _check_equal(first, other, f"the source code of {name}", sources_a[name], sources_b[name])


def _check_methods(first: Run, other: Run) -> None:
    """Raise if two runs of one label have a method of one name with different arguments."""
    methods_a, methods_b = (run.results.manifest.get("explainers", {}) for run in (first, other))
    for name in (name for name in methods_a if name in methods_b):
        if _without_speed(methods_a[name]) != _without_speed(methods_b[name]):
            _check_equal(first, other, f"arguments of {name}", methods_a[name], methods_b[name])


def _without_speed(description: Any) -> Any:
    """A method's description without the settings that change its speed alone."""
    if isinstance(description, list):
        return [_without_speed(item) for item in description]
    if not isinstance(description, dict):
        return description
    return {name: _without_speed(value) for name, value in description.items() if name not in IGNORED}


def _check_equal(first: Run, other: Run, what: str, value: Any, other_value: Any) -> None:
    if value != other_value:
        raise InputError(
            f"{first.results.folder} and {other.results.folder} cannot be compared, they differ in {what}: {value} and "
            f"{other_value}."
        )
