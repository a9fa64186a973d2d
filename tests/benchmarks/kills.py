"""Kill the command line at random moments, again and again, and compare what is finished with an undisturbed run.

    python tests/benchmarks/kills.py --kills 100 --seed 0

A run is a `fit` and a `test` of a tiny network with every callback on, on one process or on two. Each attempt is killed
(`kill -9`) in a phase and at a share of its length that the seed decides: `fit`; `explain`, from the first map on;
`score`, from the first scores on; `report`, from `scores.csv` on. On two processes one rank or both are killed; a rank
that is left alone must end by itself. After a kill no file under its final name may be cut, and after at most
`--patience` of them a command is left to finish. What it leaves (tables, curves, maps, pictures, the report, weights
and optimiser states) must equal the undisturbed run's bit for bit.

The server of `tests/forked.py` imports once and forks a child per attempt, which calls the real `cli.main`.
"""

from __future__ import annotations

import argparse
import random
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


@dataclass
class Tally:
    """What has happened."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
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
        return self.random.random(), self.random.choice([[rank] for rank in range(ranks)] + [list(range(ranks))])


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


def attempt(started: list[Process], victims: list[Process], run_dir: Path, phase: str, seconds: float) -> None:
    """Kill the victims `seconds` after the phase has begun, unless the command ends before."""
    since = time.time()
    while not begun(run_dir, phase, since):
        if any(process.poll() is not None for process in started):
            return
        time.sleep(0.01)
    time.sleep(seconds)
    for process in victims:
        process.signal(signal.SIGKILL)


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
                hit = [started[rank] for rank in victims]
                attempt(started, hit, run_dir, phase, share * plan.lengths[ranks][phase])
            status = settle(started, tally)
            tally.faults += broken_files(run_dir)
            if -signal.SIGKILL not in status:
                if any(status):
                    tally.faults.append(f"{step} in {run_dir} ended with {status}: {started[0].output[-2000:]}")
                break
            assert phase is not None
            tally.kills[phase, "all" if len(victims) == ranks else f"rank {victims[0]} of {ranks}"] += 1


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
    for fault in tally.faults:
        print(f"- {fault}")


def main() -> None:
    """Kill until there have been enough, and print what was found; exit status 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of phases, moments and victims")
    parser.add_argument("--patience", type=int, default=5, help="kills of one command before it is left to finish")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes, in turn")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="labn-kills-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        with Server(folder / "output") as server:
            wanted = {n: undisturbed(server, folder / f"undisturbed-{n}" / "run", n) for n in options.ranks}
            plan = Plan(random.Random(options.seed), {n: lengths for n, (_, lengths) in wanted.items()})
            while sum(tally.kills.values()) < options.kills:
                ranks = options.ranks[tally.runs % len(options.ranks)]
                run_dir = folder / f"{tally.runs:03d}" / "run"
                history(server, run_dir, ranks, options, plan, tally)
                tally.runs += 1
                tally.faults += [f"{run_dir}: {n} differs" for n in differences(contents(run_dir), wanted[ranks][0])]
                print(f"{sum(tally.kills.values())} kills, {len(tally.faults)} faults", file=sys.stderr, flush=True)
    report(tally)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
