"""What all data modules share: batches as dicts, exact sharding, seeded augmentation, data hashes, the bias image."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from datamodules.io.samplers import BalancedSampler, EvaluationLoader, ShuffledSampler, UnrepeatedDistributedSampler
from datamodules.io.sources import ArraySource, ImageDataset, Source
from datamodules.io.statistics import cached, channel_statistics, default_cache_dir, pixel_mean
from datamodules.io.transforms import Augmentation, Transform
from labn.errors import InputError, MissingFileError
from labn.io.images import digest
from labn.io.preprocessing import Preprocessing

Split = Literal["train", "val", "test"]
OnBadImage = Literal["stop", "skip"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
LISTED_CLASSES = 20  # `report()` counts the images of every class up to so many
_STAGES: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), None: SPLITS}


def data_root(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Folder of data set `name`: `root` with its `$VARIABLES` expanded, else `$LABN_DATA/<name>`.

    LABN_DATA defaults to `../shared/data`, which is seen from the working directory, then from the project's root.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if root is None:
        project = Path(__file__).resolve().parent.parent
        given = os.environ.get("LABN_DATA")
        bases = [Path(given)] if given else [Path("../shared/data"), project / "../shared/data"]
        candidates = [base / name for base in bases]
    else:
        candidates = [Path(os.path.expandvars(root))]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise MissingFileError(
        f"Data folder {candidates[0]} does not exist: pass `root`, or set LABN_DATA to the folder that holds '{name}'."
    )


def _one_thread(worker: int) -> None:
    # Decoding and augmentation are already spread over the workers; nested thread pools only fight for the cores.
    cv2.setNumThreads(0)


class ImageDataModule(LightningDataModule):
    """Base of the data modules. A batch is a dict

    - `image` (B,C,S,S) float32, normalised with `mean` and `std`;
    - `label` (B,) int64;
    - `index` (B,) int64, the position in the split's dataset, the same for any number of ranks and workers;
    - `mask` (B,S,S) bool, in every batch of a data set that has ground-truth regions at all; a row that is all False
      means that this sample has none;
    - `boxes` (B,1,4) float32, x1, y1, x2, y2 in pixels, where the regions are boxes: the same region, and four zeros
      where there is none;
    - `group` (B,) int64, where samples are not independent: equal for those that belong together (a day, a patient).

    Training data is shuffled (or class-balanced) and augmented with randomness from (seed, epoch, index) alone;
    validation and test data is resized and normalised, never augmented, in order, each sample on exactly one rank.
    Everything but the pixels is available without `setup`.

    Args:
        image_size: side S of the images in pixels.
        mean: per channel, of values in [0,1]; None: computed from the training split and cached.
        std: likewise, all above 0; computed, that of a channel that never changes is 1.
        batch_size: samples per batch and process.
        num_workers: worker processes per loader.
        seed: of the order of training samples and of the augmentation.
        balanced_sampler: batches of batch_size / num_classes samples of each class (labels only, nothing decoded).
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; None for none.
        on_bad_image: "stop" raises before training, naming the file; "skip" leaves the sample out and reports it.
        cache_images: decode each split once, into uint8 memory, before its first epoch.
        cache_dir: folder of the bias image and of computed statistics; None for `$XDG_CACHE_HOME/labn`, else
            `~/.cache/labn`.

    Raises:
        ValueError: `image_size` or `batch_size` below 1, another `on_bad_image`, `mean` or `std` without exactly one
            number per channel, or a `std` that is not above 0.

    Attributes:
        class_names: one per class.
        positive_classes: classes that metrics with `positives_only` score.
        channels: number of channels C.
        crop: left, top, right, bottom of what is used of every image, in fractions; None for all of it.
        shorter: None where images are squashed; else what their shorter side becomes before the middle is taken.
        fits_range: of solar frames, the physical values in FITS images that become black and white; None for others.
        caption: share of the height, at the bottom of solar frames, that is painted black.
    """

    class_names: list[str]
    positive_classes: tuple[int, ...] = (1,)
    channels: int = 3
    crop: tuple[float, float, float, float] | None = None
    shorter: int | None = None
    caption: float = 0.0
    fits_range: tuple[float, float] | None = None

    def __init__(
        self,
        image_size: int,
        mean: list[float] | None,
        std: list[float] | None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if on_bad_image not in ("stop", "skip"):
            raise InputError(f"on_bad_image is {on_bad_image!r}; it must be 'stop' or 'skip'.")
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.balanced_sampler, self.drop_last, self.augmentation = balanced_sampler, drop_last, augmentation
        if any(values is not None and len(values) != self.channels for values in (mean, std)):
            raise InputError(f"`mean` and `std` need {self.channels} numbers each, one per channel.")
        if not all(0.0 < value < math.inf for value in std or ()):
            raise InputError(f"std is {std}; what pixels are divided by must be above 0.")
        self.on_bad_image, self.cache_images = on_bad_image, cache_images
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self._mean, self._std = mean, std
        self._notes: list[str] = []
        self._reported = False
        self._preloaded: dict[str, Source] = {}
        self._hashes: dict[str, str] = {}

    @abstractmethod
    def _build(self) -> dict[Split, Source]:
        """Make the sources of the splits that there are, noting in `self._notes` what was left out."""

    @cached_property
    def _sources(self) -> dict[Split, Source]:
        return self._build()

    @property
    def num_classes(self) -> int:
        """Number of classes, known right after construction."""
        return len(self.class_names)

    @property
    def mean(self) -> list[float]:
        """Mean per channel, of values in [0,1]: as given, else of the training split."""
        return self._statistics[0].tolist() if self._mean is None else self._mean

    @property
    def std(self) -> list[float]:
        """Standard deviation per channel, of values in [0,1]: as given, else of the training split (1 for 0)."""
        return [value or 1.0 for value in self._statistics[1].tolist()] if self._std is None else self._std

    @cached_property
    def _statistics(self) -> Tensor:
        path = self.cache_dir / f"statistics_{self.fingerprint('train')}.safetensors"
        return cached(path, lambda: channel_statistics(self.source("train")))

    @property
    def splits(self) -> list[Split]:
        """The splits that this data set has."""
        return [split for split in SPLITS if split in self._sources]

    def source(self, split: Split) -> Source:
        """Names, labels and pixels of a split.

        Raises:
            ValueError: `split` is not train, val or test, or this data set does not have it.
        """
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        if split not in self._sources:
            has = ", ".join(self._sources)
            raise InputError(f"{type(self).__name__} has no {split} split, only {has}.")
        source = self._preloaded.get(split, self._sources[split])
        if not len(source):
            raise InputError(f"Split {split} has no image left; give it some, or change its fraction.")
        return source

    def dataset(self, split: Split, augment: bool = False) -> ImageDataset:
        """The split as a dataset of single samples, augmented only on request."""
        transform = Transform(self.image_size, self.mean, self.std, self.augmentation if augment else None)
        return ImageDataset(self.source(split), transform, self.seed)

    def sample_name(self, split: Split, index: int) -> str:
        """Name of sample `index` (its `index` in a batch), unique within the split."""
        return self.source(split).names[index]

    def labels(self, split: Split) -> Tensor:
        """Labels (N,) int64 of a split; decodes no image."""
        return torch.from_numpy(self.source(split).labels.copy())

    def groups(self, split: Split) -> Tensor | None:
        """Group (N,) int64 of every sample of a split, None where samples are independent."""
        groups = self.source(split).groups
        return None if groups is None else torch.from_numpy(groups.copy())

    def has_masks(self, split: Split) -> bool:
        """Whether the batches of a split carry `mask`."""
        return self.source(split).has_masks

    def fingerprint(self, split: Split) -> str:
        """Hash (16 hex digits) of a split: of names, labels, contents of the files and all that changes the pixels.

        The data hash of results and of what is cached; read once, and the same for every copy of the data set. Of
        files above 64 KiB it sees parts only, see `labn.io.images.contents`.
        """
        if split not in self._hashes:
            settings = (self.image_size, self.channels, self.crop, self.shorter, self.caption, self.fits_range)
            self._hashes[split] = digest([*settings, self.source(split).fingerprint()])
        return self._hashes[split]

    def bias_image(self) -> Tensor:
        """Pixel-wise mean of the training split, (C,S,S) float32 in [0,1], not normalised, without augmentation.

        Computed once in float64 and kept in `cache_dir` under the fingerprint of the training split.
        """
        path = self.cache_dir / f"bias_{self.fingerprint('train')}.safetensors"
        return cached(path, lambda: pixel_mean(self.source("train"), self.image_size)).float()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the splits, and why; one sentence each."""
        _ = self._sources
        return tuple(note.strip() for note in self._notes)

    def preprocessing(self) -> Preprocessing:
        """What an image goes through, without augmentation; checkpoints keep it."""
        mean, std, names = list(self.mean), list(self.std), list(self.class_names)
        return Preprocessing(self.image_size, mean, std, self.crop, self.shorter, names, self.caption, self.fits_range)

    def report(self) -> str:
        """Counts per split and class, and what was left out and why, one line each."""
        lines = [self._counts(split) for split in SPLITS if split in self._sources]
        return "\n".join([f"{type(self).__name__}:", *lines, *self._notes])

    def _counts(self, split: Split) -> str:
        labels = self.labels(split)
        counts = torch.bincount(labels, minlength=self.num_classes).tolist()
        per_class = ", ".join(f"{name} {count}" for name, count in zip(self.class_names, counts))
        if self.num_classes > LISTED_CLASSES:
            per_class = f"{sum(count > 0 for count in counts)} of {self.num_classes} classes"
        return f"  {split}: {len(labels)} images ({per_class}), data hash {self.fingerprint(split)}"

    def setup(self, stage: str | None = None) -> None:
        """Check all files and, with `cache_images`, decode the splits that `stage` needs."""
        if not self._reported:
            rank_zero_info(self.report())
            self._reported = True
        for split in _STAGES.get(stage, ("test",)):
            if self.cache_images and split not in self._preloaded:
                self._preloaded[split] = ArraySource.preloaded(self.source(split))

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples of a dataset as one batch."""
        return default_collate(samples)

    def _loader(
        self, dataset: ImageDataset, sampler: Sampler, drop_last: bool = False, kind: type[DataLoader] = DataLoader
    ) -> DataLoader:
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            worker_init_fn=_one_thread,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled or class-balanced, augmented, this rank's share; the same number of batches on every rank.

        Raises:
            ValueError: `drop_last` would leave out the only batch.
        """
        dataset, (world, rank) = self.dataset("train", augment=True), self._ranks()
        if self.balanced_sampler:
            labels = dataset.source.labels.tolist()
            balanced = BalancedSampler(labels, self.batch_size, self.num_classes, world, rank, self.seed)
            return self._loader(dataset, balanced, drop_last=True)
        shuffled = ShuffledSampler(dataset, world, rank, self.seed)
        if self.drop_last and len(shuffled) < self.batch_size:
            raise InputError(
                f"drop_last leaves no batch of {len(dataset)} images with batch_size {self.batch_size} on each "
                f"of {world} processes; set drop_last: false, or a smaller batch_size."
            )
        return self._loader(dataset, shuffled, self.drop_last)

    def eval_dataloader(self, split: Split) -> DataLoader:
        """This rank's share of a split, in order, not augmented; over all ranks every sample comes exactly once.

        A rank beyond the number of samples has no batch.

        Raises:
            ValueError: there are more processes than samples, and the module does not say that it copes with a rank
                without a batch.
        """
        dataset, (world, rank) = self.dataset(split), self._ranks()
        if len(dataset) < world and not self._module_copes():
            # The module logs in its steps, so the others would wait forever for a process without a batch.
            raise InputError(
                f"Split {split} has {len(dataset)} images for {world} processes; use at most {len(dataset)} processes, "
                "or a module that logs when an epoch ends and sets allow_zero_length_dataloader_with_multiple_devices."
            )
        return self._loader(dataset, UnrepeatedDistributedSampler(dataset, world, rank), kind=EvaluationLoader)

    def _module_copes(self) -> bool:
        module = getattr(self.trainer, "lightning_module", None)
        return bool(getattr(module, "allow_zero_length_dataloader_with_multiple_devices", False))

    def val_dataloader(self) -> DataLoader:
        """Loader of the validation split, see `eval_dataloader`."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Loader of the test split, see `eval_dataloader`."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Loader of the test split, see `eval_dataloader`."""
        return self.eval_dataloader("test")
