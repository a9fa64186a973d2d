"""SyntheticFundus: seeded fundus-like images with exact lesion masks, made on the fly, no file needed."""

from __future__ import annotations

import os

import numpy as np

from datamodules.base import SPLITS, ImageDataModule, Split
from datamodules.fundus import FundusPainter
from datamodules.sources import Source
from datamodules.transforms import FLIPS, Augmentation

# To be raised whenever the same arguments paint other pixels: it is part of the data hash.
_VERSION = 1


def synthetic_labels(seed: int, split: int, count: int) -> np.ndarray:
    """A seeded order of floor(count / 2) ones and as many (or one more) zeros, (count,) int64."""
    labels = np.arange(count, dtype=np.int64) % 2
    return np.random.default_rng([seed, split]).permutation(labels)


class SyntheticFundus(ImageDataModule):
    """Two classes of synthetic fundus images: healthy (0) and with lesions (1), the latter with their exact mask.

    Image `index` of a split depends on (data_seed, split, index) alone. Lesions are broken bright rings around a dark
    spot and cover at most 3 % of the pixels; every image also carries bright and dark blobs of the same colours, and
    the same number of bright and dark pixels, so that colour statistics do not tell the classes apart. A split is
    painted once, in `setup`, and kept in memory (uint8).

    Args:
        n_train: training images, half of them with lesions, as in the other splits.
        n_val: validation images.
        n_test: test images.
        image_size: side in pixels, at least 48.
        data_seed: of the images.
        mean: per channel, of values in [0,1].
        std: per channel, likewise.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        seed: of the training order and the augmentation.
        balanced_sampler: class-balanced batches.
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; only flips by default (a crop or an erased rectangle can remove all
            lesions of an image, whose label then is wrong), None for none.
        cache_dir: folder of the bias image.

    Raises:
        ValueError: a split has fewer than two images, or `image_size` is below 48.
    """

    def __init__(
        self,
        n_train: int = 1600,
        n_val: int = 300,
        n_test: int = 300,
        image_size: int = 64,
        data_seed: int = 0,
        mean: list[float] | None = [0.454, 0.215, 0.091],  # noqa: B006 (read only)
        std: list[float] | None = [0.348, 0.187, 0.085],  # noqa: B006 (read only)
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = FLIPS,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            image_size,
            mean,
            std,
            batch_size,
            num_workers,
            seed,
            balanced_sampler,
            drop_last,
            augmentation,
            cache_images=True,
            cache_dir=cache_dir,
        )
        self.counts: dict[Split, int] = {"train": n_train, "val": n_val, "test": n_test}
        for split, count in self.counts.items():
            if count < 2:
                raise ValueError(f"n_{split} is {count}; both classes need an image, so at least 2.")
        self.data_seed = data_seed
        self.painter = FundusPainter(image_size)
        self.class_names = ["healthy", "lesions"]

    def _build(self) -> dict[Split, Source]:
        return {split: PaintedSource(self.painter, self.data_seed, split, n) for split, n in self.counts.items()}


class PaintedSource(Source):
    """A split of `SyntheticFundus`: every image is painted when it is asked for."""

    has_masks = True

    def __init__(self, painter: FundusPainter, seed: int, split: Split, count: int) -> None:
        self.painter, self.seed, self.stream = painter, seed, SPLITS.index(split)
        self.names = [f"{split}_{i:05d}" for i in range(count)]
        self.labels = synthetic_labels(seed, self.stream, count)
        self.identity = ["synthetic fundus", _VERSION, seed, painter.size]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Source.load`."""
        rng = np.random.default_rng([self.seed, self.stream, index])
        return self.painter.paint(rng, bool(self.labels[index]))
