"""Memory and CPU time of the merge with its intervals, and of the report, over many samples.

    python tests/benchmarks/tables.py --samples 10000 100000

Score parts of three made-up explainers (five values and a curve of 33 points per sample) are written to a folder; then
the real merge makes the tables and the real report the page. Each number of samples has a process of its own, which
prints the highest anonymous memory of each step above that before it, and its CPU seconds.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """Measure each number of samples in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000])
    print(platform.machine())
    for count in parser.parse_args().samples:
        process = multiprocessing.get_context("spawn").Process(target=tables, args=(count,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
