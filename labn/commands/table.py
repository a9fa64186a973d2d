"""The papers' tables from run folders: our mean and standard deviation over seeds, the published number beside each."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from labn.compare import Run, check_comparable
from labn.errors import InputError
from labn.io.readers import read_json, read_table
from labn.metrics.statistics import Interval, bootstrap_mean
from labn.results.reader import StageResults
from labn.results.store import MANIFEST
from labn.results.training_logs import log_files

SUMMARY = "Print a table of the LABN papers from the runs, the published numbers above ours."
DETAILS = """\
A cell of ours is: mean ± standard deviation over seeds [95 % interval over samples of the seeds' mean]. The runs
are those of `cli.py sweep`, in RUNS/<experiment>/seed=*, or, where there is none, a single run in RUNS/<experiment>.
`accuracy` is what the last test logged: that of the network on the whole split, however many samples were explained.
"""
PUBLISHED = Path(__file__).with_name("published.yaml")
VARIANTS = {"paper": "", **{name: f"@{name}" for name in ("official", "stable", "random", "threshold")}}
ACCURACY = "accuracy"  # of the network: the same for every method and protocol
Scores = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A published row and the run that reproduces it.

    Attributes:
        name: as printed in the paper, or of the method.
        run: folder of the runs.
        explainer: method scored there.
        mean: one number per metric; empty for a method that the paper does not have.
        sd: their standard deviations over runs, empty where none are printed.
        config: configuration of the runs.
    """

    name: str
    run: str
    explainer: str
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    config: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper: where it stands, its columns (names of metrics), its rows."""

    source: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


@cache
def published() -> dict[str, PaperTable]:
    """All tables by their names on the command line."""
    content: dict[str, Any] = yaml.safe_load(PUBLISHED.read_text())
    return {
        name: PaperTable(
            table["source"],
            tuple(table["metrics"]),
            tuple(
                Row(r["name"], r["run"], r["explainer"], tuple(r["mean"]), tuple(r.get("sd", ())), config_of(table, r))
                for r in table["rows"]
            ),
        )
        for name, table in content.items()
    }


def config_of(table: dict[str, Any], row: dict[str, Any]) -> str:
    """Path of the configuration of a row's runs."""
    return f"configs/{table['configs']}/{row['run']}.yaml"


@dataclass(frozen=True)
class Runs:
    """The tested runs of one experiment, one per seed.

    Attributes:
        folders: their run folders.
        scores: per run, (explainer, metric) -> sample name -> value.
        accuracies: of the runs that logged theirs.
        groups: sample name -> group, where samples are not independent.
    """

    folders: tuple[Path, ...]
    scores: tuple[Scores, ...]
    accuracies: tuple[float, ...]
    groups: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> Runs:
        """The tested runs in `folder/seed=*`; without any `folder` itself if it has been tested, else none.

        Raises:
            ValueError: the runs differ in data, settings or the arguments of a method.
        """
        seeds = tuple(run for run in sorted(folder.glob("seed=*")) if _tested(run))
        # The folder of a sweep is also that of a single run with the same configuration, which is no further seed.
        folders = seeds or tuple(run for run in [folder] if _tested(run))
        groups = [_groups(run) for run in folders]
        check_comparable([_made(folder.name, run, found) for run, found in zip(folders, groups)])
        accuracies = tuple(value for run in folders for value in _accuracy(run))
        return cls(folders, tuple(map(_scores, folders)), accuracies, groups[0] if groups else {})

    def columns(self, explainer: str, metric: str) -> list[dict[str, float]]:
        """Sample name -> value, per run that has the metric."""
        return [s[explainer, metric] for s in self.scores if (explainer, metric) in s]

    def common(self, explainer: str, metric: str) -> list[str]:
        """Names of the samples that all of these runs have: mean, deviation and interval are over them alone.

        Raises:
            ValueError: there is none.
        """
        columns = self.columns(explainer, metric)
        names = sorted(set.intersection(*map(set, columns))) if columns else []
        if columns and not names:
            raise InputError(
                f"{', '.join(map(str, self.folders))} have no sample in common that {metric} of {explainer} was scored "
                "on; test them again with the same configuration."
            )
        return names

    def left_out(self, explainer: str, metric: str) -> int:
        """Samples that some of these runs have and others lack."""
        return len(set().union(*self.columns(explainer, metric))) - len(self.common(explainer, metric))

    def values(self, explainer: str, metric: str) -> list[float]:
        """Mean over the common samples of every run that has the metric."""
        names = self.common(explainer, metric)
        return [mean(column[name] for name in names) for column in self.columns(explainer, metric)]

    def interval(self, explainer: str, metric: str) -> Interval:
        """Mean over samples of each sample's mean over runs; its 95 % interval over samples, whole groups drawn."""
        columns, names = self.columns(explainer, metric), self.common(explainer, metric)
        groups = [self.groups[name] for name in names] if self.groups else None
        return bootstrap_mean([mean(column[name] for column in columns) for name in names], groups=groups)


def _tested(run: Path) -> bool:
    return (run / "test" / "scores.csv").exists()


def _scores(run: Path) -> Scores:
    found: Scores = {}
    for row in read_table(run / "test" / "scores.csv", ("name", "explainer", "metric", "value")):
        found.setdefault((row["explainer"], row["metric"]), {})[row["name"]] = row.number("value", float)
    return found


def _accuracy(run: Path) -> list[float]:
    """What the last test logged, in a list; none where nothing was."""
    column = f"test/{ACCURACY}"
    rows = itertools.chain.from_iterable(map(read_table, log_files(run, "test")))
    return [row.number(column, float) for row in rows if row.cells.get(column)][-1:]


def _groups(run: Path) -> dict[str, int]:
    rows = read_table(run / "test" / "predictions.csv", ("name",))
    return {row["name"]: row.number("group", int) for row in rows if "group" in row.cells}


def _made(label: str, run: Path, groups: dict[str, int]) -> Run:
    """What `check_comparable` must know of a run, without its scores and curves."""
    manifest = read_json(run / "test" / MANIFEST, dict)
    found = dict(enumerate(groups.values())) or None
    return Run(label, run, StageResults(run / "test", groups=found, manifest=manifest), {})


def ours(runs: Runs, explainer: str, metric: str) -> str:
    """`mean ± sd [low, high]`: over seeds, then the interval over samples; a dash without such a score.

    One sample, or one group, has no interval, nor has the accuracy: it is of the whole split, samples that were not
    explained included.
    """
    values = runs.accuracies if metric == ACCURACY else runs.values(explainer, metric)
    if not values:
        return "–"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    if metric == ACCURACY:
        return f"{mean(values):.3f}{spread}"
    return f"{mean(values):.3f}{spread}{runs.interval(explainer, metric).bracketed}"


def printed(row: Row, place: int) -> str:
    """The published number of a row, with its standard deviation where there is one."""
    return f"{row.mean[place]:.3f}" + (f" ± {row.sd[place]:.3f}" if row.sd else "")


def markdown(
    table: PaperTable,
    folder: Path,
    protocols: Sequence[str],
    metrics: Sequence[str] | None = None,
    everything: bool = False,
) -> str:
    """The table as Markdown: per published row the paper's numbers, then ours in every protocol.

    Args:
        table: which.
        folder: holds the run folders of all experiments.
        protocols: names of VARIANTS.
        metrics: columns; None takes the paper's. A column that the paper lacks has no published number.
        everything: behind these, the other methods that the same runs scored.
    """
    columns = list(metrics or table.metrics)
    lines = [f"| | | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    notes = []
    runs = {row.run: Runs.read(folder / row.run) for row in table.rows}
    others = [row for name, found in runs.items() for row in _unpublished(table, name, found)] if everything else []
    for row in (*table.rows, *others):
        if row.mean:
            places = [table.metrics.index(name) if name in table.metrics else None for name in columns]
            cells = ["–" if place is None else printed(row, place) for place in places]
            lines.append(f"| {row.name} | published | {' | '.join(cells)} |")
        for protocol in protocols:
            names = [name if name == ACCURACY else name + VARIANTS[protocol] for name in columns]
            cells = [ours(runs[row.run], row.explainer, name) for name in names]
            first = f" {row.name}" if not row.mean and protocol == protocols[0] else ""
            lines.append(f"|{first} | ours, {protocol} | {' | '.join(cells)} |")
        notes.append(f"{row.name}: {described(runs[row.run], row, folder)}")
    return "\n".join([f"{table.source}.", "", *lines, "", *notes])


def _unpublished(table: PaperTable, name: str, runs: Runs) -> list[Row]:
    """Rows without numbers for the methods that the runs of an experiment scored and the paper does not have."""
    known = {row.explainer for row in table.rows if row.run == name}
    scored = dict.fromkeys(explainer for scores in runs.scores for explainer, _ in scores)
    return [Row(f"`{explainer}` ({name})", name, explainer, (), ()) for explainer in scored if explainer not in known]


def described(runs: Runs, row: Row, folder: Path) -> str:
    """How many runs and samples stand behind a row, or how to make some."""
    if not runs.folders:
        return f"not run; python cli.py sweep --config {row.config} --seeds 38 39 40 41 42 ({folder / row.run})"
    metrics = {metric for scores in runs.scores for explainer, metric in scores if explainer == row.explainer}
    samples = max((len(runs.common(row.explainer, metric)) for metric in metrics), default=0)
    missing = max((runs.left_out(row.explainer, metric) for metric in metrics), default=0)
    lost = f" and up to {missing} left out, which not every run has" if missing else ""
    return f"{len(runs.folders)} run(s), {samples} scored samples{lost} ({folder / row.run}, {row.explainer})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", nargs="*", help=f"of {', '.join(published())}; default all of them")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the run folders")
    parser.add_argument("--protocols", nargs="+", choices=list(VARIANTS), default=["paper", "official"])
    parser.add_argument("--metrics", nargs="+", help="columns; default the paper's")
    parser.add_argument("--all", action="store_true", help="also the methods that the paper does not have")


def run(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        ValueError: there is no table of a name, or runs do not belong together.
    """
    for name in options.names or published():
        if name not in published():
            raise InputError(f"there is no table {name!r}; the tables are {', '.join(published())}.")
        text = markdown(published()[name], options.runs, options.protocols, options.metrics, options.all)
        print(f"## {name}\n\n{text}\n")
