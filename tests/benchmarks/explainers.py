"""Cost of the explainers over the forwards that they need, measured in the same run.

    python tests/benchmarks/explainers.py [--model resnet50] [--rounds 5] [--masks 64] [--only rise gradcam]

The limit of each line is the plain forward that the method cannot do without: of the prepared model (channels last,
BatchNorm folded) for RISE and Score-CAM, a graph-free forward of the network itself in channels last for the Grad-CAM
family, one forward and K passes of the tail for Ablation-CAM, one gradient in channels last for the gradient family.
Rounds run limit, method, method, limit; medians of ratios, of process CPU time (the machine may be shared) and of wall
time.
Bars: RISE and a gradient 1.05, Grad-CAM family 1.05, Score-CAM 1.06, Ablation-CAM 1.3.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from labn.explainers import RISE, AblationCAM, explainer_by_name
from labn.explainers.cam.network_tail import Tail
from labn.explainers.cam.score import ScoreCAM
from labn.inference.chunk_size import cpu_chunk
from labn.inference.fast_copy import fast_copy

SIZE = 224
GRADCAM_FAMILY = ("cam", "gradcam", "gradcam++", "xgradcam", "amg")
GRADIENT_FAMILY = {
    "gradient": (),
    "smoothgrad": ("n_samples",),
    "integrated_gradients": ("n_steps",),
    "smoothgradcam++": ("n_samples",),
}
"""Name -> the argument that is the number of gradients."""
GRADIENTS = 8
Pair = tuple[Callable[[], object], Callable[[], object], float]


def ratio(limit: Callable[[], object], method: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median CPU and wall time of `method` over `limit`, run as limit, method, method, limit."""
    limit(), method()
    found = []
    for _ in range(rounds):
        clocks = []
        for work in (limit, method, method, limit):
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            clocks.append((time.process_time() - cpu, time.perf_counter() - wall))
        found.append([(clocks[1][i] + clocks[2][i]) / (clocks[0][i] + clocks[3][i]) for i in (0, 1)])
    return statistics.median(cpu for cpu, _ in found), statistics.median(wall for _, wall in found)


@torch.no_grad()
def forwards(model: nn.Module, count: int, batch: int) -> None:
    """`count` plain forwards in channels last."""
    images = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    for start in range(0, count, batch):
        model(images[: min(batch, count - start)])


def rise(model: nn.Module, image: Tensor, masks: int) -> Pair:
    """RISE with `masks` masks and one class."""
    folded = fast_copy(model, image).copy or model
    return lambda: forwards(folded, masks, cpu_chunk(image)), lambda: RISE(masks)(model, image, torch.tensor([1])), 1.05


def gradcam_like(name: str, model: nn.Module, image: Tensor, batch: int) -> Pair:
    """A member of the Grad-CAM family on a batch."""
    explainer, images = explainer_by_name(name), image.repeat(batch, 1, 1, 1)
    targets = torch.ones(batch, dtype=torch.long)
    return lambda: forwards(model, batch, batch), lambda: explainer(model, images, targets), 1.05


def scorecam(model: nn.Module, image: Tensor, layer: str) -> Pair:
    """Score-CAM at a layer with few channels, so that a round takes seconds."""
    shapes: list[int] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, out: shapes.append(out.shape[1]))
    forwards(model, 1, 1)
    handle.remove()
    folded = fast_copy(model, image).copy or model
    explainer = ScoreCAM(layer)
    count = shapes[0] + 2  # the image itself and the baseline
    return lambda: forwards(folded, count, cpu_chunk(image)), lambda: explainer(model, image, torch.tensor([1])), 1.06


def ablationcam(model: nn.Module, image: Tensor, layer: str) -> Pair:
    """Ablation-CAM by tails at a layer, beside one forward and the bare tails in the same batches."""
    with torch.no_grad():
        tail = Tail(model, model.get_submodule(layer), image)
    channels = tail.activations.shape[1]
    batch = max(1, (1 << 22) // tail.activations.numel())

    @torch.no_grad()
    def limit() -> None:
        forwards(model, 1, 1)
        for start in range(0, channels, batch):
            tail(tail.activations.repeat(min(batch, channels - start), 1, 1, 1))

    explainer = AblationCAM(layer, closed_form=False)
    return limit, lambda: explainer(model, image, torch.tensor([1])), 1.3


def gradients(name: str, model: nn.Module, image: Tensor, batch: int) -> Pair:
    """A member of the gradient family, of one or of `GRADIENTS` gradients, beside one gradient in channels last."""
    options = dict.fromkeys(GRADIENT_FAMILY[name], GRADIENTS)
    explainer, images = explainer_by_name(name, **options), image.repeat(batch, 1, 1, 1)
    targets = torch.ones(batch, dtype=torch.long)

    def limit() -> None:
        leaf = images.clone(memory_format=torch.channels_last).requires_grad_()
        torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)

    return limit, lambda: explainer(model, images, targets), GRADIENTS if options else 1.05


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masks", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = getattr(torchvision.models, options.model)().eval()
    image = torch.randn(1, 3, SIZE, SIZE)
    lines: dict[str, Callable[[], Pair]] = {f"rise, {options.masks} masks": lambda: rise(model, image, options.masks)}
    for batch in (1, 8):
        for name in GRADCAM_FAMILY:
            lines[f"{name}, batch {batch}"] = lambda n=name, b=batch: gradcam_like(n, model, image, b)  # type: ignore[misc]
    for name in GRADIENT_FAMILY:
        for batch in (1, 16) if name == "gradient" else (1,):
            lines[f"{name}, batch {batch}"] = lambda n=name, b=batch: gradients(n, model, image, b)  # type: ignore[misc]
    lines["scorecam, layer1.0.conv1"] = lambda: scorecam(model, image, "layer1.0.conv1")
    lines["ablationcam, layer4"] = lambda: ablationcam(model, image, "layer4")
    lines["ablationcam, layer4.1.conv3"] = lambda: ablationcam(model, image, "layer4.1.conv3")
    print(f"{options.model}, {SIZE} px, fp32, {options.threads} threads, {platform.processor() or platform.machine()}")
    print(f"{'':30}{'CPU':>8}{'wall':>8}{'bar':>8}")
    for line, build in lines.items():
        if options.only and line.split(",")[0] not in options.only:
            continue
        limit, method, bar = build()
        cpu, wall = ratio(limit, method, options.rounds)
        print(f"{line:30}{cpu:8.3f}{wall:8.3f}{bar:8.2f}", flush=True)


if __name__ == "__main__":
    main()
