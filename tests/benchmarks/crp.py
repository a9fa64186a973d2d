"""Cost of explaining detections, in units of gradient x input of the same detector, measured in the same run.

    python tests/benchmarks/crp.py [--width 0.25] [--rounds 5] [--threads 1] [--device cpu]

Bars: one detection's class map <= 2.5; 20 detections of one image at least 1.5 times cheaper than 20 single calls.
Rounds are interleaved (A B B A); process CPU time on a CPU, medians of ratios. FastCopy weights are made once before.
The unit is gradient x input in the faster of both memory formats.
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
from torch import Tensor

from labn.explainers import CRP
from labn.explainers.relevance.crp import Question
from labn.models.detectors import Detector, ssd300

# Two boxes of each of the first source maps, more of those that find middle-sized objects.
PRIORS = [*range(100, 5700, 1400), *range(5800, 7900, 260), *range(7950, 8540, 120), 8600, 8650]


def gradient_times_input(detector: Detector, image: Tensor, prior: int) -> Tensor:
    image = image.detach().requires_grad_()
    logit = detector(image).classes[0, prior, 1]
    return (torch.autograd.grad(logit, image)[0] * image).sum(1)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(call: Callable[[], object], device: str) -> float:
    start = clock(device)
    call()
    return clock(device) - start


def ratios(a: Callable[[], object], b: Callable[[], object], rounds: int, device: str) -> list[float]:
    """Cost of a in units of b, once per round of A B B A."""
    for call in (a, b):
        call()
    found = []
    for _ in range(rounds):
        times = [seconds(call, device) for call in (a, b, b, a)]
        found.append((times[0] + times[3]) / (times[1] + times[2]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    detector = ssd300(21, arguments.width).to(arguments.device).eval()
    for parameter in detector.parameters():
        parameter.requires_grad_(False)
    image = torch.randn(1, 3, 300, 300, device=arguments.device)
    formats = (torch.contiguous_format, torch.channels_last)
    rivals = [(copy.deepcopy(detector).to(memory_format=f), image.contiguous(memory_format=f)) for f in formats]
    crp, questions = CRP(), [Question(prior, "class", 1) for prior in PRIORS[:20]]

    def one(question: Question) -> Tensor:
        return crp.ask(crp.trace(detector, image), [question]).maps

    def together() -> Tensor:
        return crp.ask(crp.trace(detector, image), questions).maps

    print(f"{platform.machine()}, {arguments.threads} threads, {arguments.device}, width {arguments.width}")
    for prior, source in ((3000, "conv4_3"), (6500, "conv7")):
        found = [
            statistics.median(
                ratios(
                    partial(one, Question(prior, "class", 1)),
                    partial(gradient_times_input, rival, ordered, prior),
                    arguments.rounds,
                    arguments.device,
                )
            )
            for rival, ordered in rivals
        ]
        print(f"one class map from {source}: {max(found):.2f} x gradient x input in its best format (bar 2.5)")
    apart = ratios(lambda: [one(q) for q in questions], together, max(1, arguments.rounds // 2), arguments.device)
    print(f"{len(questions)} single calls: {statistics.median(apart):.2f} x all at once (bar 1.5)")


if __name__ == "__main__":
    main()
