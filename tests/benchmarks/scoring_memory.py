"""Peak memory of scoring, 512 px and m = 1: it must grow with the chunk, not with the number of steps or images.

    python tests/benchmarks/scoring_memory.py

Every row is a process of its own; the figure is its peak resident set less that of the same process before scoring
(imports, model, one batch of images). The model is small, so that masks and inputs, not activations, would show.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys

import torch
from torch import nn

from labn.metrics import PatchInsertionDeletion

SIZE = 512
ROWS = [
    *({"chunk": chunk, "steps": 32, "batches": 1} for chunk in (1, 4, 16, 64)),
    *({"chunk": 4, "steps": steps, "batches": 1} for steps in (8, 128, 512)),
    *({"chunk": 4, "steps": 32, "batches": batches} for batches in (2, 8)),
]


def peak() -> float:
    """Peak resident set of this process in MiB."""
    scale = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def measure(chunk: int, steps: int, batches: int) -> None:
    """Print the growth of the peak in MiB while `batches` batches of one image are scored."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    metric = PatchInsertionDeletion(1, n_steps=steps, chunk_size=chunk)
    label = torch.zeros(1, dtype=torch.long)
    image, maps = torch.randn(1, 3, SIZE, SIZE), torch.rand(1, SIZE, SIZE)
    model(image)
    before = peak()
    for index in range(batches):
        metric.update(model, image + index, maps, label, label + index)
    print(f"{peak() - before:.0f}")


def main() -> None:
    """Print one row per setting, each measured in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", nargs=3, type=int, metavar=("CHUNK", "STEPS", "BATCHES"), help="measure one setting here"
    )
    options = parser.parse_args()
    if options.row:
        measure(*options.row)
        return
    print(
        f"{platform.machine()}, torch {torch.__version__}, {SIZE} px, m = 1, fp32; one chunk is chunk x 3 MiB of images"
    )
    print("chunk  steps  images  peak growth, MiB")
    for row in ROWS:
        command = [sys.executable, __file__, "--row", *map(str, row.values())]
        grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"{row['chunk']:5}  {row['steps']:5}  {row['batches']:6}  {grown}", flush=True)


if __name__ == "__main__":
    main()
