"""Memory and CPU time of the merge with its intervals, and of the report, over many samples or many methods.

    python tests/benchmarks/tables.py --samples 10000 100000
    python tests/benchmarks/tables.py --wide --samples 50000

Score shards of three made-up explainers (five values and a curve of 33 points per sample) are written to a folder; then
the real merge makes the tables and the real report the page. With `--wide` there are 20 explainers with 65 values each,
without curves and report; the shards are written as one and as two processes would, and the tables must be the same.
Each folder has a process of its own, which prints the highest anonymous memory of each step above that before it, and
its CPU seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from labn.report import RunInfo, read_stage, render, run_report
from labn.results.store import ResultStore, ScoreShard
from labn.results.tables import Plan, write_results

EXPLAINERS = ("gradient", "random", "constant")
VALUES = ("insertion16", "deletion16", "pid16", "fill_probability", "mass")
POINTS, BATCH, SHOWN = 33, 512, 500
MANY_EXPLAINERS = tuple(f"method{number}" for number in range(20))
MANY_VALUES = tuple(f"pid{number}" for number in range(1, 66))


def anonymous() -> float:
    """Memory of this process that no file backs, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


@contextmanager
def measured(name: str) -> Iterator[None]:
    """Print what a block takes."""
    before, cpu, peak, over = anonymous(), time.process_time(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    over.set()
    watcher.join()
    print(f"  {name}: {max(peak[0] - before, 0):.0f} MiB, {time.process_time() - cpu:.0f} CPU seconds", flush=True)


def part(explainer: str, first: int, last: int) -> ScoreShard:
    """Scores of a batch that follow from its first index."""
    index, noise = np.arange(first, last), np.random.default_rng([len(explainer), first])
    x = np.linspace(0, 1, POINTS, dtype=np.float32)
    lines = {line: noise.random((len(index), POINTS), dtype=np.float32) for line in ("insertion", "deletion")}
    curves = {"pid16/x": np.tile(x, (len(index), 1)), **{f"pid16/{name}": line for name, line in lines.items()}}
    return ScoreShard(
        *(explainer, "key", index, index % 2, index % 2, index % 2, noise.random(len(index))),
        values={name: noise.random(len(index)) for name in VALUES},
        keys={"pid16": "key"},
        curves={"pid16/index": index, **curves},
    )


def sha256(path: Path) -> str:
    """Hash of a file that may be larger than memory."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def wide_part(explainer: str, first: int, last: int) -> ScoreShard:
    """Many values of a batch, of which methods with a higher number have a little more."""
    index, number = np.arange(first, last), MANY_EXPLAINERS.index(explainer)
    noise = np.random.default_rng([number, first])
    shift = 0.001 * number + np.random.default_rng(first).random(len(index))
    values = {name: noise.random(len(index)) + shift for name in MANY_VALUES}
    facts = (index % 2, index % 2, index % 2, noise.random(len(index)))
    return ScoreShard(explainer, "key", index, *facts, values=values, keys={"pid1": "key"})


def tables(count: int) -> None:
    """Merge `count` samples and make their page."""
    torch.set_num_threads(1)
    print(f"{count} samples, {count * len(EXPLAINERS) * len(VALUES)} scores:", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary)
        store = ResultStore(run_dir / "test")
        for first in range(0, count, BATCH):
            for explainer in EXPLAINERS:
                store.add_scores(part(explainer, first, min(first + BATCH, count)))
        plan = Plan(dict.fromkeys(EXPLAINERS, "key"), {"pid16": ("key", VALUES)}, frozenset(range(count)))
        with measured("merge"):
            write_results(store, plan, "test", "sample_{:07d}".format, {"class_names": ["a", "b"]})
        shown = set(np.linspace(0, count - 1, SHOWN).astype(int).tolist())
        with measured("report"):
            results = read_stage(store.folder, shown, scratch_dir=store.folder)
            render(run_report(results, RunInfo("tables", run_dir, ["a", "b"], count, {})))


def wide_tables(count: int, processes: int) -> None:
    """Merge `count` samples with many methods and values, whose shards several processes have written."""
    torch.set_num_threads(1)
    scores = count * len(MANY_EXPLAINERS) * len(MANY_VALUES)
    print(f"{count} samples, {scores} scores of {processes} processes:", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        stores = [ResultStore(Path(temporary), rank) for rank in range(processes)]
        for number, first in enumerate(range(0, count, BATCH)):
            for explainer in MANY_EXPLAINERS:
                stores[number % processes].add_scores(wide_part(explainer, first, min(first + BATCH, count)))
        plan = Plan(dict.fromkeys(MANY_EXPLAINERS, "key"), {"pid1": ("key", MANY_VALUES)}, frozenset(range(count)))
        with measured("merge"):
            write_results(stores[0], plan, "test", "sample_{:07d}".format, {})
        for name in ("scores.csv", "summary.csv", "paired.csv", "ranks.csv"):
            print(f"  {name}: SHA-256 {sha256(Path(temporary) / name)[:16]}", flush=True)


def main() -> None:
    """Measure each number of samples in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--wide", action="store_true", help="20 methods with 65 values each, from 1 and 2 processes")
    options = parser.parse_args()
    print(platform.machine())
    for count in options.samples:
        for target, arguments in [(wide_tables, (count, n)) for n in (1, 2)] if options.wide else [(tables, (count,))]:
            process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
