"""Cost of relevance propagation in units of gradient x input of the same network, measured in the same run.

    python tests/benchmarks/lrp.py [--batches 1 16] [--rounds 6] [--threads 1] [--side 224] [--device cpu]
        [--memory] [--only "ratio, z+" block] [--model resnet50]

Bars for a ResNet-50 at 224 px: ratio with z+ <= 1.5, block <= 1.05, epsilon <= 1.3, and no more extra memory than
gradient x input needs plus the prepared weights; other networks (`--model lambda_resnet50`) have no bars.
The unit is the best of gradient x input in both memory formats.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from labn.lrp import Config, relevance
from labn.models.backbones import build_network

CONFIGS = {
    "ratio, z+": Config(),
    "block": Config(residual="block"),
    "epsilon, pass": Config(rule="epsilon", first_layer="same"),
    "epsilon, fold": Config(rule="epsilon", first_layer="same", batchnorm="fold"),
}
BARS = {"ratio, z+": 1.5, "block": 1.05, "epsilon, pass": 1.3, "epsilon, fold": 1.3}
UNITS = ("gradient x input", "gradient x input, channels_last")


def network(name: str, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = build_network(name, 1000, 3).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.0)
    return net.to(memory_format=torch.channels_last) if channels_last else net


def gradient_times_input(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    score = net(images).gather(1, targets[:, None]).sum()
    return (torch.autograd.grad(score, images)[0] * images).sum(1)


def zennit_epsilon_plus(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    from zennit.composites import EpsilonPlus
    from zennit.torchvision import ResNetCanonizer

    images = images.detach().requires_grad_()
    with EpsilonPlus(canonizers=[ResNetCanonizer()]).context(net) as hooked:
        score = hooked(images).gather(1, targets[:, None]).sum()
        return torch.autograd.grad(score, images)[0].sum(1)


def contestants(model: str, side: int, batch: int, device: str) -> dict[str, Callable[[], object]]:
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    targets, net, last = torch.arange(batch, device=device), network(model).to(device), network(model, True).to(device)
    for parameter in (*net.parameters(), *last.parameters()):
        parameter.requires_grad_(False)
    ordered = images.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {
        UNITS[0]: lambda: gradient_times_input(net, images, targets),
        UNITS[1]: lambda: gradient_times_input(last, ordered, targets),
    }
    for name, config in CONFIGS.items():
        calls[name] = partial(relevance, net, images, targets, config)
    try:
        if model != "resnet50":  # zennit has no rules for lambda layers
            return calls
        import zennit  # noqa: F401

        calls["zennit epsilon-plus"] = lambda: zennit_epsilon_plus(net, images, targets)
    except ImportError:
        pass
    return calls


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """(process CPU seconds, wall seconds) per call, in the order A B B A; the first call of each is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            start = time.process_time(), time.perf_counter()
            calls[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            taken[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return taken


def report(batch: int, taken: dict[str, list[tuple[float, float]]], clock: int, barred: bool) -> None:
    """Medians over the rounds of the ratio to the same round's unit; clock 0 is CPU time, 1 wall time."""
    medians = {name: statistics.median(pair[clock] for pair in pairs) for name, pairs in taken.items()}
    unit = min(UNITS, key=lambda name: medians[name])
    for name, pairs in taken.items():
        ratio = statistics.median(pair[clock] / base[clock] for pair, base in zip(pairs, taken[unit]))
        wall = statistics.median(pair[1] / base[1] for pair, base in zip(pairs, taken[unit]))
        bar = f"<= {BARS[name]}" if barred and name in BARS else ""
        print(f"| {batch} | {name} | {medians[name] * 1e3:.0f} ms | {ratio:.2f} | {wall:.2f} | {bar} |")


def _peak(model: str, name: str, side: int, batch: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    calls = contestants(model, side, 1, "cpu")
    calls[name]()
    before = peak_mib()
    contestants_at_size = contestants(model, side, batch, "cpu")
    for _ in range(2):
        contestants_at_size[name]()
    queue.put(peak_mib() - before)


def peak_mib() -> float:
    """Largest resident set of this process; `ru_maxrss` would be the parent's, where that was larger."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(model: str, side: int, batch: int, names: list[str]) -> None:
    """Growth of the peak resident set over a batch-1 call, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for name in names:
        queue: multiprocessing.Queue = context.Queue()
        process = context.Process(target=_peak, args=(model, name, side, batch, queue))
        process.start()
        print(f"| {batch} | {name} | {queue.get():.0f} MiB |")
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="resnet50", help="a name of labn.models.backbones.build_network")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each, in its own process")
    parser.add_argument("--only", nargs="+", help="methods to measure beside gradient x input; default all")
    options = parser.parse_args()
    names = [*UNITS, *(options.only or [*CONFIGS, "zennit epsilon-plus"])]
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()} {platform.processor()}, {options.threads} threads, torch {torch.__version__}")
    print("| batch | method | median CPU | CPU ratio | wall ratio | bar |\n|---|---|---|---|---|---|")
    for batch in options.batches:
        calls = contestants(options.model, options.side, batch, options.device)
        calls = {name: call for name, call in calls.items() if name in names}
        clock = 0 if options.device == "cpu" else 1
        report(batch, measure(calls, options.rounds, options.device), clock, options.model == "resnet50")
    if options.memory:
        memory(
            options.model, options.side, max(options.batches), [name for name in names if name in (*UNITS, *CONFIGS)]
        )


if __name__ == "__main__":
    main()
