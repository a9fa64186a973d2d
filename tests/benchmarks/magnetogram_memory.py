"""Training from 20 GB of memory-mapped frames: resident memory over the steps, and frames per second.

    python tests/benchmarks/magnetogram_memory.py --gigabytes 20 --steps 300

Writes sparse `{year}.npy` files (they take no room on disk) with their label tables into a temporary folder, trains
LABN on the magnetogram network through the data module's own loader, and prints the resident set every tenth of the
steps. Memory that grew with the frames read would grow by `batch x steps x 256 KiB`.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from datamodules import Magnetogram
from labn.modules import LABN

SIDE = 512
YEARS = {"train": list(range(2010, 2016)), "val": [2016], "test": [2017]}


def resident() -> float:
    """Resident set of this process in MiB, file-backed pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_year(root: Path, year: int, frames: int) -> None:
    """A sparse array of `frames` frames and its table: hourly, one in ten of class M."""
    np.lib.format.open_memmap(root / f"{year}.npy", mode="w+", dtype=np.uint8, shape=(frames, SIDE, SIDE))
    start = np.datetime64(f"{year}-01-01T00")
    rows = [f"{start + np.timedelta64(i, 'h')}.png,{2 * (i % 10 == 0)},{year}" for i in range(frames)]
    (root / f"{year}.csv").write_text("\n".join(["image,flag,year", *rows]) + "\n")


def main() -> None:
    """Write, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = max(20, round(options.gigabytes * 1e9 / SIDE**2 / 8))
        for years in YEARS.values():
            for year in years:
                write_year(root, year, frames)
        total = sum(file.stat().st_size for file in root.glob("*.npy"))
        print(f"{platform.machine()}: 8 files, {8 * frames} frames, {total / 1e9:.1f} GB; {resident():.0f} MiB before")
        data = Magnetogram(root, image_size=options.image_size, batch_size=options.batch)
        model = LABN("magnetogram_net", in_channels=1, split=0, theta=0.5, branch_weight=1.0)
        optimizer = model.configure_optimizers()["optimizer"]
        begin = time.perf_counter()
        for done, batch in enumerate(data.train_dataloader(), start=1):
            output = model(batch["image"])
            loss = model.criterion(output.logits, batch["label"]) + model.criterion(
                output.branch_logits, batch["label"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if done == 10 or done % max(1, options.steps // 10) == 0:
                rate = done * options.batch / (time.perf_counter() - begin)
                read = done * options.batch * SIDE**2 / 2**20
                print(
                    f"step {done:5}  read {read:6.0f} MiB  resident {resident():5.0f} MiB  {rate:.0f} frames/s",
                    flush=True,
                )
            if done == options.steps:
                break


if __name__ == "__main__":
    main()
