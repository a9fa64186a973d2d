"""Cost of insertion-deletion over (forwards needed x best eager fp32 forward of the same model, same run).

    python tests/benchmarks/insertion_deletion.py [--rounds 5] [--points 24] [--threads 1] [--models resnet18 resnet50]

The limit is the fastest plain forward over memory formats and batch sizes. All are measured in every round, before and
after the engine's variants, and the one with the lowest median is the limit: the lowest single time would be luck. The
variants run in the order A B C C B A on a prepared model. Process CPU time decides (the machine may be shared), wall
time stands beside it. A round does `--points` steps of each curve; `--full` does all 224 and 196. With `--keep`, freed
memory is kept, as the command line does; that makes the limit faster too.
Bars: plain <= 1.05, folded <= 0.90.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from labn.launch.allocator import keep_freed_memory
from labn.metrics import PatchInsertionDeletion
from labn.perturbation.engine import PerturbationEngine

SIZE = 224
SETTINGS = {"m=1, 224 steps": (1, 224), "m=16, step 1": (16, 196)}
BATCHES = (1, 4, 8, 16)
VARIANTS = {"plain": {"fold": False}, "folded": {"fold": True}, "bf16": {"fold": True, "precision": "bf16"}}
Clock = tuple[float, float]


def timed(work: Callable[[], int]) -> Clock:
    """CPU and wall seconds per forward of `work`, which returns its number of forwards."""
    cpu, wall = time.process_time(), time.perf_counter()
    forwards = work()
    return (time.process_time() - cpu) / forwards, (time.perf_counter() - wall) / forwards


def smooth_image(seed: int) -> Tensor:
    """A picture-like input (1, 3, 224, 224): low frequencies, normalised."""
    coarse = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")


def plain_forwards(forms: dict[torch.memory_format, nn.Module], n: int) -> dict[str, Clock]:
    """Seconds per image of the bare eager fp32 forward, for every memory format and batch size."""
    clocks = {}
    for memory_format, form in forms.items():
        for batch in BATCHES:
            images = smooth_image(0).expand(batch, -1, -1, -1).contiguous(memory_format=memory_format)

            def work(form: nn.Module = form, images: Tensor = images, batch: int = batch) -> int:
                with torch.no_grad():
                    for _ in range(-(-n // batch)):
                        form(images)
                return -(-n // batch) * batch

            clocks[f"{memory_format}, batch {batch}"] = timed(work)
    return clocks


def score(model: nn.Module, patch_size: int, steps: int, variant: str) -> tuple[Clock, Tensor]:
    """Seconds per forward needed of one image's scores, engine and metric made anew; and the curves."""
    image, maps, label = smooth_image(1), smooth_image(2)[:, 0], torch.zeros(1, dtype=torch.long)
    metric = PatchInsertionDeletion(patch_size, n_steps=steps, **VARIANTS[variant])
    curves = []

    def work() -> int:
        engine = PerturbationEngine.for_model(model, image, **metric.engine_options)
        curves.append(metric.curves(model, image, maps, label, label, cache=engine))
        return 2 * len(curves[0].counts) - 2  # both curves, less the end points that they share

    return timed(work), torch.cat([curves[0].insertion, curves[0].deletion])


def ratios_to_limit(
    model: nn.Module, calls: dict[str, Callable[[], Clock]], rounds: int, n: int = 64
) -> dict[str, list[Clock]]:
    """Seconds per forward of every call over those of the fastest plain forward (printed) in the same round."""
    forms = {
        torch.contiguous_format: model,
        torch.channels_last: copy.deepcopy(model).to(memory_format=torch.channels_last),
    }
    limits: list[dict[str, Clock]] = []
    taken: dict[str, list[Clock]] = {name: [] for name in calls}
    for _ in range(rounds):
        before = plain_forwards(forms, n)
        there = {name: call() for name, call in calls.items()}
        back = {name: calls[name]() for name in reversed(calls)}
        after = plain_forwards(forms, n)
        limits.append({name: mean([before[name], after[name]]) for name in before})
        for name in calls:
            taken[name].append(mean([there[name], back[name]]))
    fastest = min(limits[0], key=lambda name: statistics.median(limit[name][0] for limit in limits))
    print(f"    fastest plain forward: {fastest}")
    bounds = [limit[fastest] for limit in limits]
    return {name: [(c / cpu, w / wall) for (c, w), (cpu, wall) in zip(taken[name], bounds)] for name in calls}


def compare(model: nn.Module, patch_size: int, steps: int, rounds: int) -> dict[str, list[Clock]]:
    """Ratios to the limit in their own round, by variant; the largest differences between the curves are printed."""
    curves: dict[str, Tensor] = {}

    def call(variant: str) -> Clock:
        clock, curves[variant] = score(model, patch_size, steps, variant)
        return clock

    for variant in VARIANTS:
        score(model, patch_size, 4, variant)  # warm up; prepares the model
    found = ratios_to_limit(model, {variant: partial(call, variant) for variant in VARIANTS}, rounds)
    error = {v: (curves[v] - curves["plain"]).abs().max().item() for v in VARIANTS}
    print(f"    largest curve difference to plain: folded {error['folded']:.1e}, bf16 {error['bf16']:.1e}")
    return found


def mean(values: list[Clock]) -> Clock:
    """Mean of the CPU and of the wall seconds."""
    return statistics.fmean(value[0] for value in values), statistics.fmean(value[1] for value in values)


def main() -> None:
    """Print one row per model, setting and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--keep", action="store_true", help="keep freed memory")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--weights", help="safetensors file for the one model named: curve errors of a trained network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep:
        keep_freed_memory()
    print(f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds")
    for name in options.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name).eval()
        if options.weights:
            model.load_state_dict(load_file(options.weights))
        for setting, (patch_size, steps) in SETTINGS.items():
            print(f"{name}, {setting}{'' if options.full else f', shortened to {options.points} steps'}")
            steps = steps if options.full else options.points
            ratios = compare(model, patch_size, steps, options.rounds)
            for variant, values in ratios.items():
                cpu, wall = (statistics.median(value[k] for value in values) for k in (0, 1))
                low, high = min(value[0] for value in values), max(value[0] for value in values)
                print(f"    {variant:8} CPU {cpu:.3f} ({low:.3f} to {high:.3f})   wall {wall:.3f}", flush=True)


if __name__ == "__main__":
    main()
