"""ImageFolder: pictures of one's own, in one folder per class."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.base import ImageDataModule, data_root
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import SPLITS, Split, readable_records, split_off, without_copies
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import by_stem, check_crop, image_files, other_files
from labn.io.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from labn.io.readers import non_utf8_name

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass
class _FolderScan:
    """Counts of the entries of all class folders, for `report()`.

    Attributes:
        others: suffix -> number of entries that are not images.
        images: number of images.
        masked: number of images with a mask.
        unpaired_masks: mask files without an image of the same name.
    """

    others: Counter[str] = field(default_factory=Counter)
    images: int = 0
    masked: int = 0
    unpaired_masks: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """One line each about entries that are not images, masks without an image, and images with a mask."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.others.most_common())
        notes = [f"  left out {self.others.total()} entries that are not image files: {kinds}"] if kinds else []
        if self.unpaired_masks:
            notes.append(
                f"  left out {len(self.unpaired_masks)} masks without an image, such as {self.unpaired_masks[0]}"
            )
        return [*notes, f"  {self.masked} of {self.images} images have a mask"] if self.masked else notes


def _subfolders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if shown := next(filter(None, map(non_utf8_name, names)), None):
        raise InputError(f"The name of class folder {folder}/{shown} is not UTF-8; rename the folder.")
    return names


def _has_images_below(folder: Path) -> bool:
    """Whether a subfolder, or a subfolder of it as in `train/<class>`, holds an image."""
    below = [folder / name for name in _subfolders(folder)]
    return any(image_files(inner) for path in below for inner in (path, *(path / name for name in _subfolders(path))))


def _other_root(folder: Path, names: list[str]) -> str:
    """The end of a sentence about a folder with fewer than two class folders: the root that was probably meant."""
    if not names and image_files(folder):
        return f"; its images lie directly in it: where they are one class of several, give root {folder.parent}"
    if names and not image_files(folder / names[0]) and _has_images_below(folder / names[0]):
        return f"; did you mean root {folder / names[0]}"
    return ""


class ImageFolder(ImageDataModule):
    """Images in `root/<class>/*` or in `root/{train,val,test}/<class>/*`; labels follow the sorted class names.

    Without a folder `train`, all images are split at random (seeded, every class in the same shares) into training,
    validation and test; with `train` but without `val`, validation is split off the training images. Byte-identical
    images never lie in two splits: the held-out image stays, its copies are removed from training, and `report()` lists
    them. A folder with `test` alone, or `test` and `val`, is for networks that are trained already; it needs `mean` and
    `std`.

    Alpha channels are dropped, 16-bit values are divided by 256, and grey images are repeated over three channels (with
    `channels: 1`, colour images are converted to grey).

    Args:
        root: the folder; `$VARIABLES` are expanded.
        image_size: side in pixels; images are squashed to a square.
        channels: 3 (RGB) or 1 (grey).
        mask_root: folder of ground-truth regions with the same subfolders as `root`; the mask of an image has the
            image's name with any image suffix, and its non-zero pixels are the region. Images may lack a mask. None
            leaves `mask` out of the batches.
        crop: (left, top, right, bottom) as fractions of width and height; None uses the whole image.
        val_fraction: share of the images outside the test split for validation, where `root` has no folder `val`.
        test_fraction: share of all images for the test, where `root` has no folder `train`.
        split_seed: seed of the random splits.
        positive_classes: names of the classes that `positives_only` metrics score; None takes all but the first.
        mean: mean of each channel for values in [0,1]; None computes it from the training split and caches it.
        std: standard deviation of each channel for values in [0,1]; None computes it likewise.
        augmentation: augmentation of the training split; the published one (JSAI 2022) by default.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: `root`, `mask_root` or the folder of a split is missing (when the data is first used).
        InputError: the crop is empty or given in pixels (at once); or, when the data is first used, there are fewer
            than two classes, splits differ in their classes, a folder beside `train` has the name of another split
            convention, a class has no image, an image has two masks, no image has a mask, or a file is damaged.

    Example:
        >>> import tempfile, cv2
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, grey in (("cat", 60), ("dog", 180)):
        ...         (Path(folder) / name).mkdir()
        ...         for number in range(5):
        ...             picture = np.full((6, 9, 3), grey + number, np.uint8)
        ...             _ = cv2.imwrite(f"{folder}/{name}/{number}.png", picture)
        ...     data = ImageFolder(folder, image_size=4, mean=[0.5] * 3, std=[0.5] * 3)
        ...     sizes = {split: len(data.labels(split)) for split in data.splits}
        >>> data.class_names, sizes
        (['cat', 'dog'], {'train': 6, 'val': 2, 'test': 2})
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 224,
        channels: int = 3,
        mask_root: str | os.PathLike[str] | None = None,
        crop: tuple[float, float, float, float] | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        split_seed: int = 42,
        positive_classes: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augmentation: Augmentation | None = PUBLISHED,
        **kwargs: Any,
    ) -> None:
        if channels not in (1, 3):
            raise InputError(f"channels is {channels}; it must be 1 (grey) or 3 (RGB).")
        self.channels = channels
        super().__init__(image_size, mean, std, augmentation=augmentation, **kwargs)
        self.crop = check_crop(crop)
        self.root = Path(os.path.expandvars(root))
        self.mask_root = None if mask_root is None else Path(os.path.expandvars(mask_root))
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self._positive = positive_classes

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the class folders, sorted.

        Raises:
            MissingFileError: `root` does not exist.
            InputError: `root` holds fewer than two class folders, or only folders with other names for splits.
        """
        split: Split | None = "train" if self._has("train") else "test" if self._is_only_tested() else None
        folder = self._folder(split) if split else data_root(self.root.name, self.root)
        names = _subfolders(folder)
        if folder == self.root and {name.lower() for name in names} <= _SPLIT_NAMES and names:
            raise InputError(f"{folder} holds {', '.join(names)}; rename them to train, val and test.")
        if len(names) < 2:
            hint = _other_root(folder, names)
            raise InputError(
                f"{folder} holds {len(names)} class folders; one folder per class is needed, at least 2{hint}."
            )
        return names

    @property
    def positive_classes(self) -> tuple[int, ...]:  # type: ignore[override]
        """Labels of the positive classes.

        Raises:
            InputError: `positive_classes` has a name that is not a class.
        """
        if self._positive is None:
            return tuple(range(1, self.num_classes))
        if unknown := set(self._positive) - set(self.class_names):
            raise InputError(f"positive_classes has {unknown.pop()!r}; the classes are {', '.join(self.class_names)}.")
        return tuple(self.class_names.index(name) for name in self._positive)

    @property
    def event_classes(self) -> tuple[int, ...]:
        """`positive_classes`; empty for more than two classes without that argument, whose order is alphabetical."""
        return () if self._positive is None and self.num_classes > 2 else self.positive_classes

    def _has(self, split: Split) -> bool:
        return self._folder(split).is_dir()

    def _is_only_tested(self) -> bool:
        """Whether `root` holds the folder `test`, maybe `val`, and nothing else: pictures for a trained network."""
        return self._has("test") and set(_subfolders(self.root)) <= {"val", "test"}

    @property
    def mean(self) -> list[float]:
        """As in the base class; without a training split, it must be given."""
        if self._mean is None and self._is_only_tested():
            raise InputError(
                f"{self.root} has no training split to compute mean and std from; give those of the network, such as "
                f"data.init_args.mean {list(IMAGENET_MEAN)} and data.init_args.std {list(IMAGENET_STD)} for ImageNet's."
            )
        return super().mean

    def _folder(self, split: Split) -> Path:
        return self.root / split

    def _build(self) -> dict[Split, Source]:
        if self.mask_root is not None and not self.mask_root.is_dir():
            raise MissingFileError(f"mask_root {self.mask_root} does not exist.")
        self._notes, self._scan = [], _FolderScan()
        if self._has("train"):
            splits = self._read_splits()
        else:
            splits = self._read_test() if self._is_only_tested() else self._draw_splits(self._read(self.root, ""))
        if self.mask_root is not None and not self._scan.masked:
            unpaired = self._scan.unpaired_masks
            first = f"{unpaired[0]} fits none" if unpaired else "it has none in the folders of `root`"
            raise InputError(
                f"mask_root {self.mask_root} has no mask with the name of an image ({first}); rename them."
            )
        self._notes += self._scan.notes()
        return {
            split: FileSource(records, self.image_size, self.crop, self.channels, self.mask_root is not None)
            for split, records in splits.items()
        }

    def _draw_splits(self, records: list[Record]) -> dict[Split, list[Record]]:
        """Split the test images off all images at random, then the validation images off the rest."""
        rest, test, notes = split_off(records, self.test_fraction, self.split_seed, stratified=True)
        train, val, _ = split_off(rest, self.val_fraction, self.split_seed, stratified=True)
        self._notes += notes
        return {"train": train, "val": val, "test": test}

    def _read_splits(self) -> dict[Split, list[Record]]:
        """Read the splits from their folders; without a folder `val`, split validation off training at random."""
        self._check_other_folders()
        if not self._has("test"):
            raise MissingFileError(f"{self.root} has a folder 'train' but no folder 'test'.")
        test = self._read(self._folder("test"), "test")
        val = self._without_copies(self._read(self._folder("val"), "val"), test) if self._has("val") else []
        train = self._without_copies(self._read(self._folder("train"), "train"), [*val, *test])
        if not self._has("val"):
            train, val, notes = split_off(train, self.val_fraction, self.split_seed, stratified=True)
            self._notes += notes
        return {"train": train, "val": val, "test": test}

    def _read_test(self) -> dict[Split, list[Record]]:
        """Read the test images, which are also validated on where there is no folder `val`."""
        test = self._read(self._folder("test"), "test")
        return {"val": self._read(self._folder("val"), "val") if self._has("val") else test, "test": test}

    def _check_other_folders(self) -> None:
        """Raise for a folder beside `train` with another name for a split (`validation`), and note all others."""
        for folder in (self.root / name for name in _subfolders(self.root) if name not in SPLITS):
            if folder.name.lower() in _SPLIT_NAMES:
                raise InputError(f"{folder} is not read as a split; rename it to train, val or test, or move it away.")
            if self.mask_root is None or not self.mask_root.is_relative_to(folder):
                self._notes.append(f"  left out folder {folder.name} beside train")

    def _without_copies(self, records: list[Record], held_out: list[Record]) -> list[Record]:
        remaining, notes = without_copies(records, held_out)
        self._notes += notes
        return remaining

    def _read(self, folder: Path, subfolder: str) -> list[Record]:
        if self.class_names != _subfolders(folder):
            raise InputError(
                f"{folder} has other class folders than training: {', '.join(self.class_names)} are needed."
            )
        records = [
            r
            for label, name in enumerate(self.class_names)
            for r in self._class_records(folder / name, subfolder, label)
        ]
        roots = [self.root] if self.mask_root is None else [self.root, self.mask_root]
        good, notes = readable_records(records, self.on_bad_image, roots, strict_links=self.strict_links)
        self._notes += notes
        return good

    def _class_records(self, folder: Path, subfolder: str, label: int) -> list[Record]:
        files = image_files(folder)
        if not files:
            if _has_images_below(folder):
                raise InputError(
                    f"Class folder {folder} has no image, but its subfolders have; if it is the data set itself, give "
                    f"root {folder}, else move the images up into it."
                )
            raise InputError(f"Class folder {folder} has no image; remove it or put images there.")
        masks = self._masks(subfolder, folder.name)
        stems = {file.stem for file in files}
        self._scan.others += other_files(folder)
        self._scan.images += len(files)
        self._scan.masked += len(stems & masks.keys())
        self._scan.unpaired_masks += [path for stem, (path, *_) in masks.items() if stem not in stems]
        return [Record(f"{folder.name}/{f.name}", label, f, masks.get(f.stem, ())) for f in files]

    def _masks(self, subfolder: str, name: str) -> dict[str, tuple[Path, ...]]:
        """Image name without suffix -> its mask files, for one class folder."""
        folder = self.mask_root and self.mask_root / subfolder / name
        files = by_stem(image_files(folder)) if folder and folder.is_dir() else {}
        return {stem: (path,) for stem, path in files.items()}
