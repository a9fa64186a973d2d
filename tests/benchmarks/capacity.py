"""What a whole split costs: forwards, hours and disk, counted by the engine and the metrics themselves.

    python tests/benchmarks/capacity.py --gpu_rates 3000 1500

Forwards: one image of the split's size with as many random maps as `--maps` is scored with ID and PID at 2, 4, 8 and 16
pixels on a network that costs nothing, and the engine's own counter is read (both ends of the curves are shared by all
maps); RISE's maps take 8000 more each. Hours are

    images x forwards / rate / 3600

The CPU's rate is measured here: CPU seconds of one thread per forward of the split's network through the engine,
folded. A GPU's is not measured but given, in forwards per second, one number per split. Disk is what the store writes:
float32 maps without compression.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from labn.explainers import RISE
from labn.metrics import PatchInsertionDeletion
from labn.models import magnetogram_net
from labn.perturbation.engine import PerturbationEngine

PATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Job:
    """A split to explain and score: number and shape of its images, and the network that it is asked of."""

    name: str
    images: int
    channels: int
    size: int
    network: nn.Module


class Free(nn.Module):
    """Logits of two classes for next to nothing."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2)."""
        corner = images[:, 0, 0, 0]
        return torch.stack([corner, -corner], dim=1)


def jobs() -> list[Job]:
    """ImageNet's validation images and all frames of the DeFN magnetograms (2010 to 2017, hourly)."""
    resnet, small = (
        torchvision.models.resnet50(weights=None),
        magnetogram_net(),
    )
    return [
        Job("ImageNet-val, ResNet-50", 50_000, 3, 224, resnet.eval()),
        Job("magnetograms, magnetogram net", 61_315, 1, 512, small.eval()),
    ]


def forwards(job: Job, maps: int) -> int:
    """Forwards of one image whose `maps` maps are scored, as the engine counts them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, job.channels, job.size, job.size, generator=generator)
    label = torch.zeros(1, dtype=torch.long)
    engine = PerturbationEngine.for_model(Free(), images, indices=label, fold=False)
    for _ in range(maps):
        heat = torch.rand(1, job.size, job.size, generator=generator)
        for patch_size in PATCHES:
            PatchInsertionDeletion(patch_size).score(Free(), images, heat, label, label, cache=engine)
    return engine.forwards


def cpu_rate(job: Job, count: int) -> float:
    """Forwards per CPU second of one thread; the best of three."""
    images = torch.randn(1, job.channels, job.size, job.size, generator=torch.Generator().manual_seed(0))
    engine = PerturbationEngine.for_model(job.network, images, fold=True)
    best = 0.0
    for _ in range(4):  # the first one prepares the network
        start = time.process_time()
        engine.run(lambda position: images.expand(len(position), -1, -1, -1), count)
        best = max(best, count / (time.process_time() - start))
    return best


def main() -> None:
    """Count, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=5, help="maps scored per image")
    parser.add_argument("--gpu_rates", type=float, nargs=2, required=True, help="assumed forwards per second")
    parser.add_argument("--forwards", type=int, default=16, help="forwards per measurement of the CPU's rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread; {options.maps} maps per image, ID and PID at 2, 4, 8, 16")
    print(
        "| | images | forwards per image | RISE map | CPU: forwards/s, hours | GPU: forwards/s, hours | disk per map |"
    )
    print("|---|---|---|---|---|---|---|")
    for job, gpu in zip(jobs(), options.gpu_rates):
        each, rate = forwards(job, options.maps), cpu_rate(job, options.forwards)
        total = job.images * each
        disk = job.images * job.size**2 * 4 / 1e9
        print(
            f"| {job.name} | {job.images} | {each} | {RISE().n_masks} | {rate:.1f}, {total / rate / 3600:.0f} "
            f"| {gpu:.0f}, {total / gpu / 3600:.1f} | {disk:.1f} GB |"
        )


if __name__ == "__main__":
    main()
