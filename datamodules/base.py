"""The base of all data modules: batches as dicts, exact sharding, seeded augmentation, data hashes, bias image."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from datamodules.io import tar_files
from datamodules.io.samplers import BalancedSampler, EvaluationLoader, ShuffledSampler, UnrepeatedDistributedSampler
from datamodules.io.sources import ArraySource, ImageDataset, Source, check_source
from datamodules.io.splits import SPLITS, OnBadImage, Split
from datamodules.io.statistics import cached, channel_statistics, default_cache_dir, pixel_mean
from datamodules.io.transforms import Augmentation, Transform
from labn.errors import InputError, MissingFileError, printable
from labn.io.images import MAX_PIXELS, digest
from labn.io.preprocessing import Preprocessing
from labn.perturbation.scene import Scene

MAX_LISTED_CLASSES = 20
"""`report()` gives the number of images of every class where a data set has at most this many classes."""

_STAGES: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), None: SPLITS}


def data_root(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of data set `name`: `root` with its `$VARIABLES` expanded, or `$LABN_DATA/<name>` where it is None.

    Without LABN_DATA, `../shared/data/<name>` is looked for from the working directory, then from the project's root.

    Raises:
        MissingFileError: the folder does not exist.
    """
    if root is None:
        project = Path(__file__).resolve().parent.parent
        data = os.environ.get("LABN_DATA")
        bases = [Path(data)] if data else [Path("../shared/data"), project / "../shared/data"]
        candidates = [base / name for base in bases]
    else:
        candidates = [Path(os.path.expandvars(root))]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise MissingFileError(
        f"Data folder {candidates[0]} does not exist: pass `root`, or set LABN_DATA to the folder that holds '{name}'."
    )


def default_workers(cores: int, processes: int) -> int:
    """Loader processes of each of some processes on one machine: a fair share of the cores but one, from 1 to 8.

    Example:
        >>> default_workers(cores=16, processes=1), default_workers(cores=16, processes=4), default_workers(2, 8)
        (8, 3, 1)
    """
    return max(1, min(8, cores // processes - 1))


def _one_thread(worker: int) -> None:
    # Decoding and augmentation are already spread over the workers; OpenCV's own threads would compete for the same
    # cores.
    cv2.setNumThreads(0)


class ImageDataModule(LightningDataModule):
    """The base class of all data modules: a subclass names its classes and implements `_build`.

    A batch is a dict with

    - `image` (B,C,S,S) float32, normalised with `mean` and `std`;
    - `label` (B,) int64, the class;
    - `index` (B,) int64, the sample's position in its split, the same for any number of processes and workers;
    - `mask` (B,S,S) bool, the ground-truth region, in every batch of a data set that has such regions; a sample
      without a region has an all-False mask;
    - `boxes` (B,1,4) float32, x1, y1, x2, y2 in pixels, where the regions are boxes: the bounding box of `mask`, four
      zeros for an empty mask;
    - `group` (B,) int64, where samples are not independent: the number of the day or patient that they belong to.

    Training data is shuffled (or class-balanced) and augmented; its random numbers depend on (seed, epoch, index)
    alone. Validation and test data is resized and normalised, never augmented, and comes in order, each sample in
    exactly one process. Names, labels, groups and hashes are available without `setup`.

    Args:
        image_size: side S of the images in pixels.
        mean: mean of each channel, for pixel values in [0,1]; None computes it from the training split and caches it.
        std: standard deviation of each channel, above 0; None computes it likewise, with 1 for a constant channel.
        batch_size: samples per batch and process.
        num_workers: worker processes per loader; None takes none on a CPU, where they compete with the network, and
            with a GPU the CPU's cores but one, divided among the processes of the machine, up to 8.
        seed: seed of the order of training samples and of the augmentation.
        balanced_sampler: draw training batches with batch_size / num_classes samples of each class.
        drop_last: leave out an incomplete last training batch.
        augmentation: augmentation of the training split; None trains without augmentation.
        on_bad_image: "stop" raises an error that lists the files, before training; "skip" leaves the samples out and
            lists them in `report()`.
        cache_images: decode each split once, into uint8 memory, before its first epoch.
        cache_dir: folder for the bias image and for computed statistics; None takes `$XDG_CACHE_HOME/labn`, or
            `~/.cache/labn` without that variable.
        strict_links: refuse every link that leaves the data folder, for data from strangers; by default linked folders
            and images are read, and only links to files that are not images are refused.

    Raises:
        InputError: `image_size` or `batch_size` is below 1, `on_bad_image` is unknown, `mean` or `std` does not have
            one number per channel, or a `std` is not above 0.

    Attributes:
        class_names: names of the classes, in the order of their labels.
        positive_classes: labels that metrics with `positives_only` score.
        has_training_split: whether the data set can train a network.
        channels: number of channels C.
        crop: left, top, right, bottom of the used region of every image, as fractions of its size; None uses all of it.
        shorter: length in pixels that the shorter side is resized to before the central square is taken; None squashes
            the whole image.
        fits_range: physical values of FITS images that become black and white; None where FITS files are not read.
        caption: share of the height, at the bottom of solar frames, that is painted black.

    Example:
        A data module of one's own needs class names and one `Source` per split:

        >>> import numpy as np
        >>> from datamodules.io.sources import ArraySource
        >>> class Squares(ImageDataModule):
        ...     class_names = ["dark", "bright"]
        ...     def _build(self):
        ...         images = [np.full((8, 8, 3), grey, np.uint8) for grey in (0, 50, 200, 250)]
        ...         labels = np.array([0, 0, 1, 1])
        ...         return {"test": ArraySource(["a", "b", "c", "d"], labels, images, None, ["squares"])}
        >>> data = Squares(image_size=8, mean=[0.5] * 3, std=[0.5] * 3, batch_size=3)
        >>> batch = next(iter(data.test_dataloader()))
        >>> batch["image"].shape, batch["label"].tolist()
        (torch.Size([3, 3, 8, 8]), [0, 0, 1])
    """

    class_names: list[str]
    positive_classes: tuple[int, ...] = (1,)
    has_training_split: bool = True
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
        num_workers: int | None = None,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        strict_links: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if image_size**2 > MAX_PIXELS:
            raise InputError(f"image_size is {image_size}; it must be at most {math.isqrt(MAX_PIXELS)}.")
        if on_bad_image not in ("stop", "skip"):
            raise InputError(f"on_bad_image is {on_bad_image!r}; it must be 'stop' or 'skip'.")
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.balanced_sampler, self.drop_last, self.augmentation = balanced_sampler, drop_last, augmentation
        if any(values is not None and len(values) != self.channels for values in (mean, std)):
            raise InputError(f"`mean` and `std` need {self.channels} numbers each, one per channel.")
        if not all(0.0 < value < math.inf for value in std or ()):
            raise InputError(f"std is {std}; pixels are divided by it, so every number must be finite and above 0.")
        self.on_bad_image, self.cache_images, self.strict_links = on_bad_image, cache_images, strict_links
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self._mean, self._std = mean, std
        self._notes: list[str] = []
        self._reported = False
        self._preloaded: dict[str, Source] = {}
        self._hashes: dict[str, str] = {}

    @abstractmethod
    def _build(self) -> dict[Split, Source]:
        """Make one source for each split of the data set, and list omitted files in `self._notes`."""

    @cached_property
    def _sources(self) -> dict[Split, Source]:
        sources = self._build()
        return {split: check_source(split, source, self.num_classes) for split, source in sources.items()}

    @property
    def num_classes(self) -> int:
        """Number of classes, known right after construction."""
        return len(self.class_names)

    @property
    def mean(self) -> list[float]:
        """Mean of each channel for values in [0,1]: the argument, or computed from the training split."""
        return self._statistics[0].tolist() if self._mean is None else self._mean

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel for values in [0,1]: the argument, or computed (1 instead of 0)."""
        return [value or 1.0 for value in self._statistics[1].tolist()] if self._std is None else self._std

    @cached_property
    def _statistics(self) -> Tensor:
        path = self.cache_dir / f"statistics_{self.fingerprint('train')}.safetensors"
        return cached(path, lambda: channel_statistics(self.source("train")))

    @property
    def splits(self) -> list[Split]:
        """Names of the splits of this data set, in the order train, val, test."""
        return [split for split in SPLITS if split in self._sources]

    def source(self, split: Split) -> Source:
        """The source of a split: its names, labels and pixels.

        Raises:
            InputError: `split` is not train, val or test, is not a split of this data set, or has no image.
        """
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        if split not in self._sources:
            has = ", ".join(self._sources)
            raise InputError(f"{type(self).__name__} has no {split} split, only {has}.")
        source = self._preloaded.get(split, self._sources[split])
        if not len(source):
            raise InputError(f"Split {split} has no image left; add images to it, or change its fraction.")
        return source

    def dataset(self, split: Split, augment: bool = False) -> ImageDataset:
        """The split as a dataset of single samples; `augment` applies the training augmentation."""
        transform = Transform(self.image_size, self.mean, self.std, self.augmentation if augment else None)
        return ImageDataset(self.source(split), transform, self.seed)

    def sample_name(self, split: Split, index: int) -> str:
        """Name of the sample whose `index` in a batch is `index`; names are unique within the split."""
        return self.source(split).names[index]

    def labels(self, split: Split) -> Tensor:
        """Labels (N,) int64 of a split; no image is decoded."""
        return torch.from_numpy(self.source(split).labels.copy())

    def groups(self, split: Split) -> Tensor | None:
        """Group (N,) int64 of every sample of a split; None where samples are independent."""
        groups = self.source(split).groups
        return None if groups is None else torch.from_numpy(groups.copy())

    def has_masks(self, split: Split) -> bool:
        """Whether the batches of a split carry `mask`."""
        return self.source(split).has_masks

    def has_scenes(self, split: Split) -> bool:
        """Whether `scene` gives the objects that the images of a split were drawn from."""
        return self._sources[split].has_scenes

    def scene(self, split: Split, index: int) -> Scene:
        """The image of sample `index` as a list of objects, which can be drawn again without any of them.

        Objects that have no visible pixel are always drawn and not listed.

        Raises:
            InputError: the images of the split were not drawn from objects.
        """
        drawn, transform = self._sources[split].scene(index), Transform(self.image_size, self.mean, self.std)
        masks = drawn.masks()
        seen = np.array([mask.any() for mask in masks])
        names = tuple(layer.name for layer, visible in zip(drawn.layers, seen) if visible)

        def draw(kept: Tensor) -> Tensor:
            objects = ~seen
            objects[seen] = kept.cpu().numpy()
            return transform(drawn.draw(objects))[0]

        return Scene(names, torch.from_numpy(masks[seen]), draw)

    def fingerprint(self, split: Split) -> str:
        """Data hash (16 hex digits) of a split: names, labels, file contents and all settings that change pixels.

        Results and cached files are labelled with it. It is computed once per process and is equal for every copy of
        the data set. Of files above 64 KiB it reads samples only, see `labn.io.images.content_hash`.
        """
        if split not in self._hashes:
            settings = (self.image_size, self.channels, self.crop, self.shorter, self.caption, self.fits_range)
            self._hashes[split] = digest([*settings, self.source(split).fingerprint()])
        return self._hashes[split]

    def bias_image(self) -> Tensor:
        """Pixel-wise mean (C,S,S) float32 in [0,1] of the training images, neither normalised nor augmented.

        It is computed once, in float64, and stored in `cache_dir` under the training split's fingerprint.
        """
        path = self.cache_dir / f"bias_{self.fingerprint('train')}.safetensors"
        return cached(path, lambda: pixel_mean(self.source("train"), self.image_size)).float()

    @property
    def notes(self) -> tuple[str, ...]:
        """Files that were left out of the splits, with the reason; one sentence each."""
        _ = self._sources  # fills `_notes`
        return tuple(note.strip() for note in self._notes)

    def preprocessing(self) -> Preprocessing:
        """The steps from a picture file to a network's input, without augmentation; checkpoints store them."""
        mean, std, names = list(self.mean), list(self.std), list(self.class_names)
        return Preprocessing(self.image_size, mean, std, self.crop, self.shorter, names, self.caption, self.fits_range)

    def report(self, splits: Sequence[Split] = SPLITS) -> str:
        """Number of images per split and class, then the notes about omitted files, one line each.

        Args:
            splits: the splits to count; those that the data set does not have are left out.
        """
        lines = [self._counts(split) for split in splits if split in self._sources]
        return "\n".join([f"{type(self).__name__}:", *map(printable, (*lines, *self._notes))])

    def _counts(self, split: Split) -> str:
        labels, counts = self.labels(split), self._class_counts(split)
        per_class = ", ".join(f"{name} {count}" for name, count in zip(self.class_names, counts))
        if self.num_classes > MAX_LISTED_CLASSES:
            per_class = f"{sum(count > 0 for count in counts)} of {self.num_classes} classes"
        return f"  {split}: {len(labels)} images ({per_class}), data hash {self.fingerprint(split)}"

    @property
    def event_classes(self) -> tuple[int, ...]:
        """Labels that count as an event for the true skill statistic; empty where the classes define no event."""
        return self.positive_classes

    def prepare_data(self) -> None:
        """Check all files before Lightning starts the loggers, so that damaged files leave no run behind.

        With several processes the check is that of `setup`, which runs in all of them: an error in one process alone
        would leave the others waiting.
        """
        if self._ranks()[0] == 1:
            _ = self._sources

    def setup(self, stage: str | None = None) -> None:
        """Check all files, print the report once and, with `cache_images`, decode the splits that `stage` needs.

        The report of a test or validation counts its own split alone.
        """
        if not self._reported:
            rank_zero_info(self.report(SPLITS if stage in (None, "fit") else _STAGES.get(stage, ("test",))))
            for split in ("train", "test") if self.has_training_split else ():
                self._warn_of_empty_classes(split)
            self._reported = True
        for split in _STAGES.get(stage, ("test",)):
            if self.cache_images and split not in self._preloaded:
                self._preloaded[split] = ArraySource.preloaded(self.source(split))

    def _warn_of_empty_classes(self, split: Split) -> None:
        """Warn of classes without an image in a split: a network cannot learn them, or a test cannot judge them."""
        if split not in self._sources:
            return
        counts = self._class_counts(split)
        if empty := [name for name, count in zip(self.class_names, counts) if not count]:
            more = f" and {len(empty) - MAX_LISTED_CLASSES} more" if len(empty) > MAX_LISTED_CLASSES else ""
            listed = f"{', '.join(empty[:MAX_LISTED_CLASSES])}{more}"
            rank_zero_warn(f"Split {split} has no image of {len(empty)} of {self.num_classes} classes: {listed}.")

    def _class_counts(self, split: Split) -> list[int]:
        """Number of images of every class in a split."""
        return torch.bincount(self.labels(split), minlength=self.num_classes).tolist()

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _workers(self) -> int:
        """`num_workers`, or a number that suits the device."""
        if self.num_workers is not None:
            return self.num_workers
        strategy = getattr(self.trainer, "strategy", None)
        if self.trainer is None or strategy is None or strategy.root_device.type == "cpu":
            return 0
        return default_workers(os.cpu_count() or 1, self.trainer.num_devices)

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack samples of a dataset into one batch."""
        return default_collate(samples)

    def _loader(
        self, dataset: ImageDataset, sampler: Sampler, drop_last: bool = False, kind: type[DataLoader] = DataLoader
    ) -> DataLoader:
        workers = self._workers()
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=workers,
            collate_fn=self.collate,
            worker_init_fn=_one_thread,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader:
        """This process's share of the training split, shuffled or class-balanced, and augmented.

        Every process gets the same number of batches.

        Raises:
            InputError: `drop_last` would leave out the only batch.
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
        """This process's share of a split, in order and not augmented; all shares together hold every sample once.

        With more processes than samples, the last processes get no batch.

        Raises:
            InputError: there are more processes than samples, and the LightningModule does not set
                `allow_zero_length_dataloader_with_multiple_devices`.
        """
        dataset, (world, rank) = self.dataset(split), self._ranks()
        if len(dataset) < world and not self._module_allows_empty_loaders():
            # A module that logs in its steps synchronises there: the other processes would wait forever for one
            # without a batch.
            raise InputError(
                f"Split {split} has {len(dataset)} images for {world} processes; use at most {len(dataset)} processes, "
                "or a module that logs when an epoch ends and sets allow_zero_length_dataloader_with_multiple_devices."
            )
        return self._loader(dataset, UnrepeatedDistributedSampler(dataset, world, rank), kind=EvaluationLoader)

    def _module_allows_empty_loaders(self) -> bool:
        module = getattr(self.trainer, "lightning_module", None)
        return bool(getattr(module, "allow_zero_length_dataloader_with_multiple_devices", False))

    def val_dataloader(self) -> DataLoader:
        """Loader of the validation split; see `eval_dataloader`."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Loader of the test split; see `eval_dataloader`."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Loader of the test split; see `eval_dataloader`."""
        return self.eval_dataloader("test")

    def check_storable(self) -> None:
        """Compare the samples of this data module with those of the base class, which are all that shards can hold.

        Raises:
            InputError: samples have further fields, as the lists of objects of `VOC`.
        """
        for split in self.splits:
            extra = self.dataset(split)[0].keys() - ImageDataModule.dataset(self, split)[0].keys()
            if extra:
                raise InputError(
                    f"Samples of {type(self).__name__} carry {', '.join(sorted(extra))} too, which shards would lose; "
                    "shards are for data sets with one class, and at most one region and one group, per image."
                )

    def write_shards(self, folder: str | os.PathLike[str], samples_per_shard: int = 1000) -> dict[str, Any]:
        """Write every split to tar files with an index, for `datamodules.TarShards`.

        Pixels are stored losslessly as this data module prepares them: cropped and resized, not augmented.

        Args:
            folder: folder to write to; it is created, and existing shards in it are replaced.
            samples_per_shard: samples in one tar file.

        Returns:
            The manifest: class names, preparation, and for every split its numbers of samples and shards.

        Raises:
            InputError: `samples_per_shard` is below 1, a picture cannot be read, or samples have fields that shards
                cannot hold, as those of `VOC` have.
        """
        return tar_files.write_shards(self, Path(folder), samples_per_shard)
