"""Cost of average drop and percentage in over (forwards needed x best eager fp32 forward of the same model, same run).

    python tests/benchmarks/confidence_metrics.py [--model resnet50] [--rounds 5] [--images 8] [--threads 1]

The limit is that of `insertion_deletion.py`: the plain forward with the lowest median over memory formats and batch
sizes, measured in every round before and after the metrics, which run in the order A B B A on a prepared model. Needed
are two forwards per image for average drop (and percent increase, which shares them), six for all percentages in all
three forms. Process CPU time decides (the machine may be shared), wall time stands beside it. Bar: plain <= 1.05.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from functools import partial

import torch
import torchvision
from insertion_deletion import Clock, ratios_to_limit, smooth_image, timed
from torch import Tensor, nn

from labn.metrics import metric_by_name
from labn.perturbation.engine import PerturbationEngine

METRICS = {"average_drop": (["average_drop", "percent_increase"], 2), "pctin": (["pctin"], 6)}
FORMS = {"plain": False, "folded": True}


def score(model: nn.Module, images: Tensor, maps: Tensor, names: list[str], needed: int, fold: bool) -> Clock:
    """Seconds per forward needed, engine and metrics made anew."""
    targets, indices = torch.zeros(len(images), dtype=torch.long), torch.arange(len(images))

    def work() -> int:
        engine = PerturbationEngine.for_model(model, images, fold=fold)
        for name in names:
            metric_by_name(name).score(model, images, maps, targets, indices, cache=engine)
        if engine.forwards != needed * len(images):
            raise AssertionError(f"{names}: {engine.forwards} forwards, {needed * len(images)} are needed")
        return engine.forwards

    return timed(work)


def compare(model: nn.Module, images: Tensor, maps: Tensor, rounds: int) -> dict[str, list[Clock]]:
    """Ratios to the limit in their own round, by metric and form."""
    calls = {
        f"{metric}, {form}": partial(score, model, images, maps, names, needed, fold)
        for metric, (names, needed) in METRICS.items()
        for form, fold in FORMS.items()
    }
    for call in calls.values():
        call()  # warm up; prepares the model
    return ratios_to_limit(model, calls, rounds, n=16)


def main() -> None:
    """Print one row per metric and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds")
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model).eval()
    images = torch.cat([smooth_image(seed) for seed in range(options.images)])
    maps = torch.cat([smooth_image(100 + seed)[:, 0] for seed in range(options.images)])
    for variant, values in compare(model, images, maps, options.rounds).items():
        cpu, wall = (statistics.median(value[k] for value in values) for k in (0, 1))
        low, high = min(value[0] for value in values), max(value[0] for value in values)
        print(f"{options.model}, {variant:20} CPU {cpu:.3f} ({low:.3f} to {high:.3f})   wall {wall:.3f}", flush=True)


if __name__ == "__main__":
    main()
