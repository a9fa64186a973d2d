"""Coverage of the intervals of means, and the error rate of differences of all pairs taken together.

    python tests/benchmarks/intervals.py --experiments 4000

Every experiment draws n samples (or n groups of one to five samples, of which about half equal the value of their
group) from a distribution with a known mean. The table has the share of experiments whose 95 % interval holds this
mean: percentiles of the resamples, BCa, and the interval of the tables (`MeanTable.bounds`), with its mean width. The
second table has the share of experiments in which any of ten pairs of equally good methods differs at the level of 5 %:
every pair alone, and all taken together.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import Beta, Normal

from labn.metrics.comparisons import Value, compare_values
from labn.metrics.intervals import MeanTable, acceleration, bca_levels, bias, quantiles

SIZES, LEVEL, RESAMPLES, CHUNK = (9, 20, 50), 0.95, 10_000, 250
LIMIT = 0.93
DISTRIBUTIONS = {"beta(.3, 1.5)": Beta(0.3, 1.5), "beta(.5, .5)": Beta(0.5, 0.5), "normal": Normal(0.0, 1.0)}

Bounds = tuple[Tensor, Tensor]


def experiments(distribution: Beta | Normal, n: int, grouped: bool, count: int) -> MeanTable:
    """One column of n units per experiment."""
    if not grouped:
        values = distribution.sample((n, count)).double()
        sizes = torch.ones(n, count, dtype=torch.float64)
        return table(values, sizes)
    sizes = torch.randint(1, 6, (n, count)).double()
    own, shared = distribution.sample((5, n, count)).double(), distribution.sample((n, count)).double()
    values = torch.where(torch.rand(5, n, count) < 0.5, shared, own)
    there = torch.arange(5)[:, None, None] < sizes
    return table((values * there).sum(0), sizes)


def table(sums: Tensor, sizes: Tensor) -> MeanTable:
    """Means of the experiments, from the sums and the numbers of samples (n, count) of their units."""
    means = sums.sum(0) / sizes.sum(0)
    return MeanTable(means, sizes.sum(0).long(), sums - sizes * means, sizes, torch.arange(len(means)))


def percentiles(drawn: MeanTable, deviations: Tensor) -> Bounds:
    levels = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64).expand(len(drawn.means), 2)
    low, high = quantiles(deviations, levels).unbind(1)
    return drawn.means + low, drawn.means + high


def bca(drawn: MeanTable, deviations: Tensor) -> Bounds:
    jackknife = (drawn.sums.sum(0) - drawn.sums) / (drawn.sizes.sum(0) - drawn.sizes)
    levels = bca_levels(bias(deviations), acceleration(jackknife), LEVEL)
    low, high = quantiles(deviations, levels).unbind(1)
    return drawn.means + low, drawn.means + high


KINDS: dict[str, Callable[[MeanTable, Tensor], Bounds]] = {
    "percentiles": percentiles,
    "BCa": bca,
    "tables": lambda drawn, deviations: drawn.bounds(deviations, LEVEL),
}


def coverage(distribution: Beta | Normal, n: int, grouped: bool, count: int) -> tuple[dict[str, float], float]:
    """Share of covering intervals of each kind, and the mean width of those of the tables."""
    covered, width = dict.fromkeys(KINDS, 0), 0.0
    for start in range(0, count, CHUNK):
        drawn = experiments(distribution, n, grouped, min(CHUNK, count - start))
        deviations = drawn.resampled(RESAMPLES, seed=start)
        for kind, bounds in KINDS.items():
            low, high = bounds(drawn, deviations)
            covered[kind] += int(((low <= distribution.mean) & (distribution.mean <= high)).sum())
        width += float((high - low).sum())
    return {kind: number / count for kind, number in covered.items()}, width / count


def methods(n: int, count: int) -> Iterator[Value]:
    """Five equally good methods per experiment, whose scores depend on the sample, the method and both."""
    for _ in range(count):
        yield Value((Normal(0.0, 1.0).sample((n, 1)) + Beta(0.5, 0.5).sample((n, 5))).double())


def errors(n: int, count: int) -> tuple[float, float]:
    """Share of experiments with any difference at the level of 5 %, of pairs alone and taken together."""
    alone = together = 0
    for compared in compare_values(methods(n, count), n_resamples=2000):
        alone += any(difference.p <= 0.05 for difference in compared.differences.values())
        together += any(difference.stands for difference in compared.differences.values())
    return alone / count, together / count


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000)
    count = parser.parse_args().experiments
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    print(f"{platform.machine()}, {count} experiments\n")
    print(f"| units | groups | distribution | {' | '.join(KINDS)} | mean width |\n|{'---|' * (4 + len(KINDS))}")
    lowest = 1.0
    for n in SIZES:
        for grouped in (False, True):
            for name, distribution in DISTRIBUTIONS.items():
                shares, width = coverage(distribution, n, grouped, count)
                cells = " | ".join(f"{share:.3f}" for share in shares.values())
                print(f"| {n} | {'yes' if grouped else 'no'} | {name} | {cells} | {width:.3f} |", flush=True)
                lowest = min(lowest, shares["tables"])
    print(f"\nlowest coverage of the tables {lowest:.3f}, wanted {LIMIT}\n")
    print("| units | any of ten pairs alone | all taken together |\n|---|---|---|")
    for n in SIZES:
        print("| {} | {:.3f} | {:.3f} |".format(n, *errors(n, count)), flush=True)
    print(f"\n{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
