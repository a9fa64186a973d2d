"""Kill the command line at random moments, again and again, and compare what is finished with an undisturbed run.

    python tests/benchmarks/kills.py --kills 300 --pairs 100 --seed 0

A run is a `fit` and a `test` of a tiny network with every callback on, on one process or on two. Each attempt is killed
(`kill -9`) in a phase and at a share of its length that the seed decides: `fit`; `explain`, from the first map on;
`score`, from the first scores on; `report`, from `scores.csv` on. On two processes one rank is killed, or both, or what
started them; a rank that is left alone must end by itself. After a kill no file under its final name may be cut, and
after at most `--patience` of them a command is left to finish. What it leaves (tables, curves, maps, pictures, the
report, weights and optimiser states) must equal the undisturbed run's bit for bit, and no temporary file may stay.

A pair is two commands in one folder, the second of which starts at a random moment of the first. Each must end well or
with one of the sentences in `SENTENCES`, one of them well; a `test` after them must leave what it leaves undisturbed.

The server of `tests/forked.py` imports once and forks a child per attempt, which calls the real `cli.main`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from forked import Process, Server
from run_contents import broken_files, contents, differences

CONFIG = ["--config", "tests/faults/small.yaml"]
PHASES = {"fit": ("fit",), "test": ("explain", "score", "report")}
FIRST = {"fit": "fit.yaml", "explain": "test/maps/*.safetensors", "score": "test/scores/*", "report": "test/scores.csv"}
"""The file whose appearance begins a phase."""
WAIT = 60.0
"""Seconds in which a rank must notice that another one has gone."""
PAIRS = [("fit", "fit"), ("test", "test"), ("fit", "test"), ("test", "fit")]
SENTENCES = (
    "is in use: process",
    "has been removed or moved while this command ran",
    "best.ckpt does not exist; ",
    "has gone since this command began",
)
LAUNCHER = -1
"""The victim that stands for the processes that started the ranks."""


@dataclass
class Tally:
    """What has happened."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    attempts: int = 0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """What the seed decides.

    Attributes:
        random: the generator.
        lengths: ranks -> phase -> seconds of the undisturbed run.
    """

    random: random.Random
    lengths: dict[int, dict[str, float]]

    def phases(self, phases: tuple[str, ...], count: int) -> list[str]:
        """Phases of the attempts at a command, in order, because a phase that is over does not begin again."""
        return sorted(self.random.choices(phases, k=count), key=phases.index)

    def draw(self, ranks: int) -> tuple[float, list[int]]:
        """A share of the phase's length in [0, 1], and the ranks to kill."""
        victims = [[rank] for rank in range(ranks)] + [list(range(ranks))] + [[LAUNCHER]] * (ranks > 1)
        return self.random.random(), self.random.choice(victims)


def command(step: str, run_dir: Path) -> list[str]:
    """The words that a user gives, again and again, until the command ends by itself."""
    saved = (run_dir / "checkpoints" / "last.ckpt").exists()
    checkpoint = ["--ckpt_path=best"] if step == "test" else ["--ckpt_path=last"] if saved else []
    return [step, *CONFIG, f"--run_dir={run_dir}", *checkpoint]


def begun(run_dir: Path, phase: str, since: float) -> bool:
    """Whether the phase has begun, in this attempt."""
    return any(path.stat().st_mtime >= since for path in run_dir.glob(FIRST[phase]))


def undisturbed(server: Server, run_dir: Path, ranks: int) -> tuple[dict[str, object], dict[str, float]]:
    """Contents of a run that nobody kills, and the seconds of its phases."""
    lengths = {}
    for step, phases in PHASES.items():
        started, seen = server.start(*command(step, run_dir), ranks=ranks), {}
        since = time.time()
        while any(process.poll() is None for process in started):
            seen |= {p: time.time() for p in phases if p not in seen and begun(run_dir, p, since)}
            time.sleep(0.01)
        end = time.time()
        if status := [process.poll() for process in started if process.poll()]:
            raise SystemExit(f"The undisturbed {step} ended with {status}:\n{started[0].output[-3000:]}")
        lengths |= {p: end - seen[p] for p in phases}
        if "report" in seen:
            lengths |= {p: seen["report"] - seen[p] for p in ("explain", "score")}
    return contents(run_dir), lengths


def left_over(run_dir: Path) -> list[str]:
    """Temporary files and locks that no complete run may leave."""
    return [f"{path} is left over" for pattern in (".*.tmp", ".*.lock") for path in run_dir.rglob(pattern)]


def attempt(started: list[Process], victims: list[int], run_dir: Path, phase: str, seconds: float) -> None:
    """Kill the victims `seconds` after the phase has begun, unless the command ends before."""
    since = time.time()
    while not begun(run_dir, phase, since):
        if any(process.poll() is not None for process in started):
            return
        time.sleep(0.01)
    time.sleep(seconds)
    for victim in victims:
        if victim == LAUNCHER:
            for process in started:
                process.orphan()
        else:
            started[victim].signal(signal.SIGKILL)


def settle(started: list[Process], tally: Tally) -> list[int]:
    """Exit statuses, once every rank has ended."""
    begin = time.monotonic()
    status = [process.wait(WAIT) for process in started]
    tally.slowest = max(tally.slowest, time.monotonic() - begin)
    return status


def history(server: Server, run_dir: Path, ranks: int, options: argparse.Namespace, plan: Plan, tally: Tally) -> None:
    """One run, killed several times on the way."""
    for step, phases in PHASES.items():
        for phase in [*plan.phases(phases, options.patience), None]:
            share, victims = plan.draw(ranks)
            started = server.start(*command(step, run_dir), ranks=ranks)
            tally.attempts += 1
            if phase is not None and sum(tally.kills.values()) < options.kills:
                attempt(started, victims, run_dir, phase, share * plan.lengths[ranks][phase])
            status = settle(started, tally)
            tally.faults += broken_files(run_dir)
            if -signal.SIGKILL not in status:
                if any(status):
                    tally.faults.append(f"{step} in {run_dir} ended with {status}: {started[0].output[-2000:]}")
                break
            assert phase is not None
            one = "launcher" if victims == [LAUNCHER] else f"rank {victims[0]} of {ranks}"
            tally.kills[phase, "all" if len(victims) == ranks else one] += 1


def pair(server: Server, run_dir: Path, finished: Path, seconds: float, plan: Plan, tally: Tally) -> None:
    """Two commands in one folder, and a test after them.

    Args:
        server: starts the commands.
        run_dir: their folder, which is made.
        finished: folder of a finished run, which is copied where the first command is a test.
        seconds: the longest time between the two starts.
        plan: decides commands and moments.
        tally: what has happened.
    """
    words = plan.random.choice(PAIRS)
    if words != ("fit", "fit"):
        shutil.copytree(finished, run_dir)
        shutil.rmtree(run_dir / "test")
    started = []
    for word in words:
        checkpoint = ["--ckpt_path=best"] if word == "test" else []
        started += server.start(word, *CONFIG, f"--run_dir={run_dir}", *checkpoint)
        time.sleep(plan.random.random() * seconds if len(started) == 1 else 0)
    status = settle(started, tally)
    ends = [(process.output.splitlines() or [""])[-1] for process in started]
    said = [next((s for s in SENTENCES if s in end), end) if code else "done" for code, end in zip(status, ends)]
    tally.pairs[f"{words[0]}: {said[0]} | {words[1]}: {said[1]}"] += 1
    if "done" not in said or not set(said) <= {"done", *SENTENCES}:
        tally.faults.append(f"{words} in {run_dir} ended with {status}: {ends}")
    server.run("test", *CONFIG, f"--run_dir={run_dir}", "--ckpt_path=best", check=False)
    tally.faults += broken_files(run_dir) + left_over(run_dir)


def check(run_dir: Path, wanted: dict[str, object], tally: Tally) -> None:
    """Compare a finished run with the undisturbed one, and remove it if it is right."""
    faults = left_over(run_dir) + [f"{run_dir}: {name} differs" for name in differences(contents(run_dir), wanted)]
    tally.faults += faults
    if not faults:
        shutil.rmtree(run_dir)
    done = f"{sum(tally.kills.values())} kills, {sum(tally.pairs.values())} pairs, {len(tally.faults)} faults"
    print(done, file=sys.stderr, flush=True)


def report(tally: Tally) -> None:
    """Print the table."""
    whom = sorted({victim for _, victim in tally.kills})
    print(f"\n| phase | {' | '.join(whom)} |\n|---{'|---' * len(whom)}|")
    for phase in FIRST:
        print(f"| {phase} | {' | '.join(str(tally.kills[phase, victim]) for victim in whom)} |")
    print(
        f"\n{sum(tally.kills.values())} kills in {tally.runs} runs ({tally.attempts} commands); a rank left alone "
        f"ended within {tally.slowest:.1f} s; {len(tally.faults)} faults."
    )
    for outcome, count in sorted(tally.pairs.items()):
        print(f"- {count} pairs: {outcome}")
    for fault in tally.faults:
        print(f"- {fault}")


def stop(tally: Tally) -> None:
    """Print what has happened so far."""
    report(tally)
    os._exit(bool(tally.faults))


def main() -> None:
    """Kill until there have been enough, and print what was found; exit status 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of commands in one folder")
    parser.add_argument("--seed", type=int, default=0, help="of phases, moments and victims")
    parser.add_argument("--patience", type=int, default=5, help="kills of one command before it is left to finish")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes, in turn")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    tally = Tally()
    signal.signal(signal.SIGTERM, lambda *_: stop(tally))
    with tempfile.TemporaryDirectory(prefix="labn-kills-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        with Server(folder / "output") as server:
            counts = sorted({*options.ranks, *[1] * bool(options.pairs)})
            wanted = {n: undisturbed(server, folder / f"undisturbed-{n}" / "run", n) for n in counts}
            plan = Plan(random.Random(options.seed), {n: lengths for n, (_, lengths) in wanted.items()})
            while sum(tally.kills.values()) < options.kills or sum(tally.pairs.values()) < options.pairs:
                if sum(tally.kills.values()) < options.kills:
                    ranks = options.ranks[tally.runs % len(options.ranks)]
                    run_dir = folder / f"{tally.runs:03d}" / "run"
                    history(server, run_dir, ranks, options, plan, tally)
                    tally.runs += 1
                    check(run_dir, wanted[ranks][0], tally)
                # In turn, so that a run that is stopped early has tried both.
                share = sum(tally.kills.values()) / options.kills if options.kills else 1.0
                while (number := sum(tally.pairs.values())) < share * options.pairs:
                    run_dir = folder / f"pair-{number:03d}" / "run"
                    pair(server, run_dir, folder / "undisturbed-1" / "run", plan.lengths[1]["fit"], plan, tally)
                    check(run_dir, wanted[1][0], tally)
    report(tally)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
