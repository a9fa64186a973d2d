"""What a device does: forwards per second of a model alone, of the insertion-deletion engine and of RISE; training.

    python tests/benchmarks/gpu.py [--device cuda] [--model resnet50] [--rounds 5] [--forwards 4096]

Alone is the best batch size and memory format of the eager model, BatchNorm unfolded, in the precision of the line;
the engines choose for themselves. Every round runs alone, engine, engine, alone; medians of wall time, after
`torch.cuda.synchronize`. Bar: alone over engine <= 1.05. `fp32` is IEEE single precision in all lines.
Training steps are those of LABN on the same backbone, batch 32, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from labn.explainers import RISE
from labn.inference.modes import evaluating
from labn.metrics import PatchInsertionDeletion
from labn.modules import LABN
from labn.perturbation.engine import PRECISIONS

SIZE = 224
BATCHES = (1, 16, 64, 128, 256)
Work = Callable[[], int]


def rate(work: Work, device: torch.device) -> float:
    """Inputs per second of `work`, which returns how many it did."""
    _wait(device)
    start = time.perf_counter()
    done = work()
    _wait(device)
    return done / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alone(model: nn.Module, device: torch.device, precision: str, count: int) -> tuple[str, Work]:
    """The best form of the bare forward, by one trial of each, and its name."""
    forms: dict[str, Work] = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for batch in (size for size in BATCHES if size <= count):
            images = torch.randn(batch, 3, SIZE, SIZE, device=device).contiguous(memory_format=memory_format)

            def work(images: Tensor = images, memory_format: torch.memory_format = memory_format) -> int:
                model.to(memory_format=memory_format)
                reduced = PRECISIONS[precision]
                with torch.no_grad(), evaluating(model), torch.autocast(device.type, reduced, reduced is not None):
                    for _ in range(count // len(images)):
                        model(images)
                return count // len(images) * len(images)

            work()
            forms[f"{memory_format}, batch {batch}"] = work
    best = max(forms, key=lambda name: rate(forms[name], device))
    return best, forms[best]


def insertion_deletion(model: nn.Module, device: torch.device, precision: str, count: int) -> Work:
    """Curves of m = 16 on as many images as `count` forwards make."""
    metric = PatchInsertionDeletion(16, precision=precision)
    steps = len(metric.counts((SIZE, SIZE)))
    number = max(1, count // (2 * steps))
    images, maps = torch.randn(number, 3, SIZE, SIZE, device=device), torch.rand(number, SIZE, SIZE, device=device)
    labels, indices = torch.zeros(number, dtype=torch.long, device=device), torch.arange(number)

    def work() -> int:
        metric.curves(model, images, maps, labels, indices)
        return number * (2 * steps - 2)  # both curves, less the end points that they share

    return work


def rise(model: nn.Module, device: torch.device, count: int) -> Work:
    """One image, `count` masks; float32 alone."""
    explainer, image = RISE(count), torch.randn(1, 3, SIZE, SIZE, device=device)

    def work() -> int:
        explainer(model, image, torch.zeros(1, dtype=torch.long, device=device))
        return count

    return work


def training(backbone: str, device: torch.device, precision: str, steps: int) -> Work:
    """Steps of LABN on random images."""
    module = LABN(backbone).to(device)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = {
        "image": torch.randn(32, 3, SIZE, SIZE, device=device),
        "label": torch.arange(32, device=device) % 2,
        "index": torch.arange(32, device=device),
    }
    reduced = PRECISIONS[precision]
    parameters = [p for p in module.parameters() if p.requires_grad]

    def work() -> int:
        for _ in range(steps):
            with torch.autocast(device.type, reduced, reduced is not None):
                terms, _ = module.losses(batch, "train")
            torch.autograd.grad(terms["loss"], parameters)
        return steps * 32

    return work


def main() -> None:
    """Print a row per precision and engine, and the training throughput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forwards", type=int, default=4096, help="per measurement")
    parser.add_argument("--steps", type=int, default=10, help="training steps per measurement")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = getattr(torchvision.models, options.model)().eval().to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}, {options.model}, {SIZE} px, median of {options.rounds} rounds")
    print("| precision | engine | alone /s | engine /s | overhead | alone |\n|---|---|---|---|---|---|")
    for precision in PRECISIONS:
        best, bare = alone(model, device, precision, options.forwards)
        engines = {"insertion-deletion": insertion_deletion(model, device, precision, options.forwards)}
        if precision == "fp32":
            engines["RISE"] = rise(model, device, options.forwards)
        for engine, work in engines.items():
            work()
            rounds = [[rate(call, device) for call in (bare, work, work, bare)] for _ in range(options.rounds)]
            limit = statistics.median(statistics.fmean((first, last)) for first, _, _, last in rounds)
            found = statistics.median(statistics.fmean(both) for _, *both, _ in rounds)
            print(f"| {precision} | {engine} | {limit:.1f} | {found:.1f} | {limit / found:.2f} | {best} |", flush=True)
    for precision in PRECISIONS:
        step = training(options.model, device, precision, options.steps)
        step()
        found = statistics.median(rate(step, device) for _ in range(options.rounds))
        print(f"| {precision} | LABN training | | {found:.1f} images/s | | |", flush=True)


if __name__ == "__main__":
    main()
