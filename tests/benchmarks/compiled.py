"""What `torch.compile` would gain over the engine's fast copy: time of a forward, and forwards until it pays.

    python tests/benchmarks/compiled.py [--network resnet50] [--batch 8] [--dynamic] [--device cpu]

Process CPU time on the CPU (its compiler's processes counted), wall time elsewhere. `--dynamic` compiles once for all
batch sizes, as the engine's last chunks need.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

from labn.inference.fast_copy import runnable_copy
from labn.inference.modes import run_model


def spent(device: str) -> float:
    """Seconds spent so far, by this process and its ended children on the CPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds(run: Callable[[], Tensor], device: str, rounds: int = 4) -> float:
    """The least time of `run` in some rounds."""
    times = []
    for _ in range(rounds):
        start = spent(device)
        run()
        times.append(spent(device) - start)
    return min(times)


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = options.device
    model = torchvision.models.get_model(options.network, weights=None).eval().to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    prepared = runnable_copy(model, images)
    copy, form = prepared.copy, prepared.form.memory_format
    assert copy is not None
    with torch.no_grad():
        expected, eager = run_model(copy, images, form), seconds(lambda: run_model(copy, images, form), device)
        start = spent(device)
        built = torch.compile(copy, dynamic=options.dynamic or None)
        logits = run_model(built, images, form)
        cost = spent(device) - start
        compiled = seconds(lambda: run_model(built, images, form), device)
        eager = min(eager, seconds(lambda: run_model(copy, images, form), device))
    even = f"{options.batch * cost / (eager - compiled):.0f}" if compiled < eager else "never"
    difference = float((logits.softmax(1) - expected.softmax(1)).abs().max())
    print("| network | batch | dynamic | compiled / fast copy | compilation, s | forwards until it pays | difference |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {options.network} | {options.batch} | {options.dynamic} | {compiled / eager:.2f} | {cost:.1f} | {even} "
        f"| {difference:.1e} |"
    )


if __name__ == "__main__":
    main()
