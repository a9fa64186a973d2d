"""Damage valid files at random and let every reader read them: only the documented errors may come out.

    python tests/benchmarks/fuzz_readers.py --minutes 10 --seed 0

Prints rounds and outcomes per reader, and every failure with the seed that repeats it (`--only NAME --round SEED`).
Exit status 1 where there was a failure.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzzing import TARGETS, Fuzzer, Opened  # noqa: E402


def main() -> None:
    """Fuzz, print, exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="readers")
    parser.add_argument("--round", help="repeat this round alone, as a failure names it")
    options = parser.parse_args()
    failures: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        opened = Opened()
        fuzzers = {name: Fuzzer(name, Path(folder) / name, opened) for name in options.only}
        outcomes: dict[str, Counter[str]] = {name: Counter() for name in fuzzers}
        end, number = time.monotonic() + 60 * options.minutes, 0
        while time.monotonic() < end:
            for name, fuzzer in fuzzers.items():
                try:
                    outcomes[name][fuzzer.once(options.round or f"{options.seed}.{number}")] += 1
                except AssertionError as error:
                    failures[name] += 1
                    print(f"FAILURE {error}", flush=True)
            number += 1
            if options.round:
                break
    for name, counts in outcomes.items():
        print(f"{name}: {sum(counts.values())} rounds, {dict(counts.most_common())}, {failures[name]} failures")
    total = sum(map(Counter.total, outcomes.values())) + failures.total()
    print(f"{platform.machine()}: {total} rounds, {failures.total()} failures, seed {options.seed}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
