"""Memory of a rank over many samples, and the first look-up in a folder with many map records.

    python tests/benchmarks/scale.py --samples 100000 --records 1000000

Samples: a real test (data module, callbacks, store, merge) of a linear network on pictures of 8 x 8 pixels, with the
anonymous memory of the process every tenth of the way and after the merge; what was held for every sample would show.
Records: shards of `--batch` maps each are written, then a new store asks for the maps of one batch; beside it what
opening every shard would have taken.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from callbacks import EvaluationCallback, ExplanationCallback
from datamodules.base import ImageDataModule
from datamodules.io.sources import Source
from datamodules.io.splits import Split
from labn.explainers import explainer_by_name
from labn.results.shard_index import shard_name
from labn.results.store import MAPS, ResultStore

SIDE = 8


class TinySource(Source):
    """Noise that follows from the index."""

    has_masks = False

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count, dtype=np.int64) % 2
        self.names = [f"tiny_{index}" for index in range(count)]
        self.identity = ["tiny", count]

    def load(self, index: int) -> tuple[np.ndarray, None]:
        """See `Source.load`."""
        return np.random.default_rng(index).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8), None


class TinyData(ImageDataModule):
    """Only a test split."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__(SIDE, [0.5] * 3, [0.25] * 3, batch_size=batch_size)
        self.class_names, self.count = ["a", "b"], count

    def _build(self) -> dict[Split, Source]:
        return {"test": TinySource(self.count)}


class Linear(pl.LightningModule):
    """A network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 2))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The callbacks do the work."""


def memory(field: str = "RssAnon") -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


class Watch(pl.Callback):
    """Prints the memory every tenth of the way."""

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        """See Lightning."""
        batches, done = int(trainer.num_test_batches[0]), trainer.test_loop.batch_progress.current.processed
        if done % max(1, batches // 10) == 0 or done == batches:
            print(f"  {done * trainer.datamodule.batch_size:>9} samples: {memory():.0f} MiB", flush=True)


def samples(count: int, batch: int, folder: Path) -> None:
    """Test `count` samples and print the memory on the way."""
    explainers = {name: explainer_by_name(name) for name in ("random", "gradient")}
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        inference_mode=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ExplanationCallback(explainers),
            EvaluationCallback(["pid4"], baselines=False, chunk_size=batch),
            Watch(),
        ],
    )
    start = time.perf_counter()
    trainer.test(Linear(), datamodule=TinyData(count, batch), verbose=False)
    print(f"  after the merge: {memory():.0f} MiB, highest ever {memory('VmHWM'):.0f} MiB (with mapped files)")
    rows = sum(1 for _ in (folder / "test" / "scores.csv").open()) - 1
    print(f"  {rows} rows of scores.csv, {time.perf_counter() - start:.0f} s")


def records(count: int, batch: int, folder: Path) -> None:
    """Write `count` maps and print how long a new store takes for one batch."""
    (folder / "maps").mkdir()
    for first in range(0, count, batch):
        index = torch.arange(first, min(first + batch, count))
        path = folder / "maps" / shard_name("gradient", "0123456789ab", index.tolist(), f"r0{MAPS}")
        save_file({"index": index, "maps": torch.zeros(len(index), 2, 2)}, path)
    before, start = memory(), time.perf_counter()
    store = ResultStore(folder)
    found = store.maps("gradient", "0123456789ab", range(count // 2, count // 2 + batch))
    first_time = time.perf_counter() - start
    assert len(found) == min(batch, count - count // 2)
    start = time.perf_counter()
    store.maps("gradient", "0123456789ab", range(0, batch))
    again = time.perf_counter() - start
    print(f"  first batch {first_time:.3f} s, next {1000 * again:.1f} ms, index {memory() - before:.0f} MiB")
    start = time.perf_counter()
    paths = sorted((folder / "maps").iterdir())
    for path in paths:
        with safe_open(path, framework="pt") as file:
            file.get_tensor("index")
    print(f"  opening all {len(paths)} shards instead: {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, batches of {options.batch}")
    for size, work in ((options.records, records), (options.samples, samples)):
        if size:
            print(f"{size} {work.__name__}:")
            with tempfile.TemporaryDirectory() as folder:
                work(size, options.batch, Path(folder))


if __name__ == "__main__":
    main()
