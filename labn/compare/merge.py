"""Merge the scores of several runs, sample by sample, and refuse what does not belong together."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labn.compare.runs import Run
from labn.errors import InputError
from labn.metrics.statistics import Interval, bootstrap_mean

Column = dict[str, float]
"""Sample name -> value."""
IGNORED = ("chunk_size", "fold")
"""Settings that change how fast something is computed, not what."""


@dataclass(frozen=True)
class Row:
    """A method of a run, or of all seeds of a run, in one metric.

    Attributes:
        label: of the run.
        explainer: name of the method.
        metric: name of the value.
        interval: mean over samples of the means over seeds, with the interval over samples, whole groups drawn; its
            bounds are NaN where there is one sample or one group.
        std: standard deviation of the seeds' means (n - 1); None where there is one seed.
        seeds: number of trained networks.
    """

    label: str
    explainer: str
    metric: str
    interval: Interval
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` returns.

    Attributes:
        runs: the runs, in the order given.
        columns: (label, explainer, metric) -> sample name -> mean over seeds.
        rows: the table.
        paired: (first, second, metric, interval of the difference), first and second as `row_name` gives them.
        left_out: metric -> number of samples that not every row has.
        asked: values that the runs were asked for by name, and the probability of the bare fill.
        groups: sample name -> group, where samples are not independent; None where they are.
    """

    runs: list[Run]
    columns: dict[tuple[str, str, str], Column]
    rows: list[Row]
    paired: list[tuple[str, str, str, Interval]]
    left_out: dict[str, int]
    asked: list[str]
    groups: dict[str, int] | None

    def groups_of(self, names: Iterable[str]) -> list[int] | None:
        """Groups of the samples, as intervals draw them; None where samples are drawn singly."""
        return None if self.groups is None else [self.groups[name] for name in names]

    def row_name(self, label: str, explainer: str) -> str:
        """How a row is called: by its method, and by its run where there are several."""
        return explainer if len({run.label for run in self.runs}) == 1 else f"{label}: {explainer}"


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Merge runs into one table over the samples that all of them have, matched by name.

    Raises:
        ValueError: the runs differ in data, split, protocol or explained class, a label mixes different methods under
            one name, one network is scored differently in two folders, or no sample is common.
    """
    runs = list(runs)
    check_comparable(runs)
    seeds = _by_seed(runs)
    asked = list(dict.fromkeys([name for run in runs for name in run.results.headline]))
    names = _common_names(seeds)
    left_out = {m: n for m, n in ((m, _missing(seeds, m, common)) for m, common in names.items()) if n}
    found = Comparison(runs, {}, [], [], left_out, asked, _groups(runs))
    for (label, explainer, metric), networks in seeds.items():
        if len(networks) != (expected := len({run.checkpoint for run in runs if run.label == label})):
            raise InputError(
                f"{label}: {len(networks)} of its {expected} networks have {metric} of {explainer}; score all of "
                "them alike, or give the runs labels of their own (LABEL=RUN)."
            )
        common = names[metric]
        means = {name: statistics.fmean(column[name] for column in networks.values()) for name in common}
        found.columns[label, explainer, metric] = means
        own = [statistics.fmean(column[name] for name in common) for column in networks.values()]
        std = statistics.stdev(own) if len(own) > 1 else None
        interval = bootstrap_mean(list(means.values()), groups=found.groups_of(common))
        found.rows.append(Row(label, explainer, metric, interval, std, len(own)))
    found.paired.extend(_differences(found))
    return found


def _differences(found: Comparison) -> Iterator[tuple[str, str, str, Interval]]:
    for metric in found.asked:
        rows = [(label, explainer) for label, explainer, name in found.columns if name == metric]
        for first, second in itertools.combinations(rows, 2):
            a, b = (found.columns[label, explainer, metric] for label, explainer in (first, second))
            differences = [value - b[name] for name, value in a.items()]
            interval = bootstrap_mean(differences, groups=found.groups_of(a))
            yield found.row_name(*first), found.row_name(*second), metric, interval


def _by_seed(runs: Sequence[Run]) -> dict[tuple[str, str, str], dict[str, Column]]:
    """(label, explainer, metric) -> checkpoint -> scores; folders of one network complete each other."""
    merged: dict[tuple[str, str, str], dict[str, Column]] = {}
    for run in runs:
        for (explainer, metric), scores in run.results.scores.items():
            networks = merged.setdefault((run.label, explainer, metric), {})
            column = networks.setdefault(run.checkpoint, {})
            for index, value in scores.items():
                name = run.results.names[index]
                if not math.isclose(column.setdefault(name, value), value, rel_tol=1e-4, abs_tol=1e-5):
                    raise InputError(
                        f"{run.results.folder}: {metric} of {explainer} for {name} is {value}, another folder of "
                        f"the same network says {column[name]}; give them labels of their own (LABEL=RUN)."
                    )
    return merged


def _groups(runs: Sequence[Run]) -> dict[str, int] | None:
    """Sample name -> group of all runs, which agree on them; None where they have no groups."""
    if runs[0].results.groups is None:
        return None
    found: dict[str, int] = {}
    for run in runs:
        for index, name in run.results.names.items():
            group = (run.results.groups or {})[index]
            if found.setdefault(name, group) != group:
                raise InputError(
                    f"{run.results.folder}: {name} is in group {group}, another run says {found[name]}; test both "
                    "again with one data module."
                )
    return found


def _common_names(seeds: dict[tuple[str, str, str], dict[str, Column]]) -> dict[str, list[str]]:
    """Metric -> names of the samples that every row and seed with this metric has, in the first one's order."""
    names: dict[str, list[str]] = {}
    for (_, _, metric), networks in seeds.items():
        for column in networks.values():
            names[metric] = [name for name in names.get(metric, column) if name in column]
    for metric, common in names.items():
        if not common:
            raise InputError(f"{metric}: no sample is common to all runs; explain the same samples in each.")
    return names


def _missing(seeds: dict[tuple[str, str, str], dict[str, Column]], metric: str, common: list[str]) -> int:
    every = {n for key, networks in seeds.items() if key[2] == metric for column in networks.values() for n in column}
    return len(every) - len(common)


def check_comparable(runs: Sequence[Run]) -> None:
    """Stop before runs are put into one table that do not belong together.

    Raises:
        ValueError: they differ in data, split, protocol or explained class, or one label's in a method of one name.
    """
    for run in runs[1:]:
        _check_protocol(runs[0], run)
    for first, other in itertools.combinations(runs, 2):
        if first.label == other.label:
            _check_methods(first, other)


def _check_protocol(first: Run, other: Run) -> None:
    """Refuse runs on different data or under different protocols."""
    a, b = first.results.manifest, other.results.manifest
    for key, meaning in (("data", "data"), ("split", "split"), ("target", "explained class")):
        _refuse(first, other, meaning, a.get(key), b.get(key))
    there = ["missing" if run.results.groups is None else "there" for run in (first, other)]
    _refuse(first, other, "the column 'group' of predictions.csv", *there)
    mine, theirs = a.get("settings", {}), b.get("settings", {})
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in IGNORED:
            _refuse(first, other, f"protocol ({name})", mine.get(name), theirs.get(name))
    mine, theirs = a.get("sources", {}), b.get("sources", {})
    for name in (name for name in mine if name in theirs):
        _refuse(first, other, f"the source code of {name}", mine[name], theirs[name])


def _check_methods(first: Run, other: Run) -> None:
    """Refuse runs of one label in which one name stands for differently set methods."""
    mine, theirs = (run.results.manifest.get("explainers", {}) for run in (first, other))
    for name in (name for name in mine if name in theirs):
        if _telling(mine[name]) != _telling(theirs[name]):
            _refuse(first, other, f"arguments of {name}", mine[name], theirs[name])


def _telling(description: Any) -> Any:
    """A method's description without what changes only how fast it is."""
    if isinstance(description, list):
        return [_telling(item) for item in description]
    if not isinstance(description, dict):
        return description
    return {name: _telling(value) for name, value in description.items() if name not in IGNORED}


def _refuse(first: Run, other: Run, what: str, mine: Any, theirs: Any) -> None:
    if mine != theirs:
        raise InputError(
            f"{first.results.folder} and {other.results.folder} cannot be compared, they differ in {what}: {mine} and "
            f"{theirs}."
        )
