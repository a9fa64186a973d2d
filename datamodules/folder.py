"""ImageFolder: a user's own pictures, one folder per class."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from datamodules.base import SPLITS, ImageDataModule, OnBadImage, Split, data_root
from datamodules.io.sources import FileSource, Record, Source
from datamodules.io.splits import readable_records, split_off, without_copies
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.images import by_stem, check_crop, image_files, other_files
from labn.io.readers import non_utf8_name

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass
class _FolderScan:
    """What reading the folders came across: entries that are no images, images, those with a mask, masks of none."""

    others: Counter[str] = field(default_factory=Counter)
    images: int = 0
    masked: int = 0
    alone: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """A line about the entries that were left out, and one about images and masks where they do not pair up."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.others.most_common())
        notes = [f"  left out {self.others.total()} entries that no image is named like: {kinds}"] if kinds else []
        if self.alone:
            notes.append(f"  left out {len(self.alone)} masks without an image, such as {self.alone[0]}")
        return [*notes, f"  {self.masked} of {self.images} images have a mask"] if self.masked else notes


def _subfolders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if shown := next(filter(None, map(non_utf8_name, names)), None):
        raise InputError(f"The name of class folder {folder}/{shown} is not UTF-8; rename the folder.")
    return names


class ImageFolder(ImageDataModule):
    """Images in `root/<class>/*`, or in `root/{train,val,test}/<class>/*`; classes are numbered in sorted order.

    Without `train` all images are split at random (seeded) into training, validation and test; with `train` but
    without `val`, validation is split off training. Byte-identical images never end up on two sides: held-out ones
    stay, their copies leave training, and `report()` says so. Colour images lose an alpha channel, 16-bit values are
    divided by 256, grey images are repeated over three channels (or colour ones averaged with `channels: 1`).

    Args:
        root: the folder; `$VARIABLES` are expanded.
        image_size: side in pixels; images are squashed to a square.
        channels: 3 (RGB) or 1 (grey).
        mask_root: folder with ground-truth regions, laid out as `root`, with a file of the image's name (any image
            suffix) where there is a region; every pixel that is not 0 belongs to it; `report()` counts the images that
            have one. None: no `mask` in batches.
        crop: (left, top, right, bottom) in fractions of width and height; None for no crop.
        val_fraction: share of the images (of those left after the test split) for validation, where none is given.
        test_fraction: share of the images for the test, where no split is given.
        split_seed: of the random splits.
        positive_classes: names of the classes that `positives_only` metrics score; None: all but the first.
        mean: per channel, of values in [0,1]; None: computed from the training split and cached.
        std: likewise.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        seed: of the training order and the augmentation.
        balanced_sampler: class-balanced batches.
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; None for none.
        on_bad_image: "stop" or "skip".
        cache_images: keep decoded images in memory.
        cache_dir: folder of the bias image and of computed statistics.

    Raises:
        FileNotFoundError: `root`, `mask_root` or a split's folder is missing (when the data is first needed).
        ValueError: an empty crop or one in pixels (at once), fewer than two classes, unequal classes between splits, a
            folder beside `train` that is no split, a class without image, two masks of one image, no mask of any image,
            a bad image file.
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
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = PUBLISHED,
        on_bad_image: OnBadImage = "stop",
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise InputError(f"channels is {channels}; it must be 1 (grey) or 3 (RGB).")
        self.channels = channels
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
            on_bad_image,
            cache_images,
            cache_dir,
        )
        self.crop = check_crop(crop)
        self.root = Path(os.path.expandvars(root))
        self.mask_root = None if mask_root is None else Path(os.path.expandvars(mask_root))
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self._positive = positive_classes

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the class folders, sorted.

        Raises:
            FileNotFoundError: `root` does not exist.
            ValueError: it holds fewer than two class folders, or folders of splits by other names.
        """
        folder = self._folder("train") if self._has("train") else data_root(self.root.name, self.root)
        names = _subfolders(folder)
        if folder == self.root and {name.lower() for name in names} <= _SPLIT_NAMES and names:
            raise InputError(f"{folder} holds {', '.join(names)}; rename them to train, val and test.")
        if len(names) < 2:
            raise InputError(f"{folder} holds {len(names)} class folders; one folder per class is needed, at least 2.")
        return names

    @property
    def positive_classes(self) -> tuple[int, ...]:  # type: ignore[override]
        """Numbers of the positive classes.

        Raises:
            ValueError: a name given is no class.
        """
        if self._positive is None:
            return tuple(range(1, self.num_classes))
        if unknown := set(self._positive) - set(self.class_names):
            raise InputError(f"positive_classes has {unknown.pop()!r}; the classes are {', '.join(self.class_names)}.")
        return tuple(self.class_names.index(name) for name in self._positive)

    def _has(self, split: Split) -> bool:
        return self._folder(split).is_dir()

    def _folder(self, split: Split) -> Path:
        return self.root / split

    def _build(self) -> dict[Split, Source]:
        if self.mask_root is not None and not self.mask_root.is_dir():
            raise MissingFileError(f"mask_root {self.mask_root} does not exist.")
        self._notes, self._seen = [], _FolderScan()
        parts = self._given() if self._has("train") else self._drawn(self._read(self.root, ""))
        if self.mask_root is not None and not self._seen.masked:
            first = f"{self._seen.alone[0]} fits none" if self._seen.alone else "it has none in the folders of `root`"
            raise InputError(
                f"mask_root {self.mask_root} has no mask with the name of an image ({first}); rename them."
            )
        self._notes += self._seen.notes()
        return {
            split: FileSource(records, self.image_size, self.crop, self.channels, self.mask_root is not None)
            for split, records in parts.items()
        }

    def _drawn(self, records: list[Record]) -> dict[Split, list[Record]]:
        """Test, then validation, split off all images."""
        rest, test, notes = split_off(records, self.test_fraction, self.split_seed)
        train, val, _ = split_off(rest, self.val_fraction, self.split_seed)
        self._notes += notes
        return {"train": train, "val": val, "test": test}

    def _given(self) -> dict[Split, list[Record]]:
        """The splits of the folder names; validation drawn from training where it has no folder."""
        self._look_beside()
        if not self._has("test"):
            raise MissingFileError(f"{self.root} has a folder 'train' but no folder 'test'.")
        test = self._read(self._folder("test"), "test")
        val = self._apart(self._read(self._folder("val"), "val"), test) if self._has("val") else []
        train = self._apart(self._read(self._folder("train"), "train"), [*val, *test])
        if not self._has("val"):
            train, val, notes = split_off(train, self.val_fraction, self.split_seed)
            self._notes += notes
        return {"train": train, "val": val, "test": test}

    def _look_beside(self) -> None:
        """Refuse a folder beside `train` that is a split by its name, and note any other one."""
        for folder in (self.root / name for name in _subfolders(self.root) if name not in SPLITS):
            if folder.name.lower() in _SPLIT_NAMES:
                raise InputError(f"{folder} is no split by its name; rename it to train, val or test, or move it away.")
            if self.mask_root is None or not self.mask_root.is_relative_to(folder):
                self._notes.append(f"  left out folder {folder.name} beside train")

    def _apart(self, records: list[Record], held_out: list[Record]) -> list[Record]:
        kept, notes = without_copies(records, held_out)
        self._notes += notes
        return kept

    def _read(self, folder: Path, part: str) -> list[Record]:
        if self.class_names != _subfolders(folder):
            raise InputError(
                f"{folder} has other class folders than training: {', '.join(self.class_names)} are needed."
            )
        records = [r for label, name in enumerate(self.class_names) for r in self._class(folder / name, part, label)]
        roots = [self.root] if self.mask_root is None else [self.root, self.mask_root]
        good, notes = readable_records(records, self.on_bad_image, roots)
        self._notes += notes
        return good

    def _class(self, folder: Path, part: str, label: int) -> list[Record]:
        files = image_files(folder)
        if not files:
            raise InputError(f"Class folder {folder} has no image; remove it or put images there.")
        masks = self._masks(part, folder.name)
        stems = {file.stem for file in files}
        self._seen.others += other_files(folder)
        self._seen.images += len(files)
        self._seen.masked += len(stems & masks.keys())
        self._seen.alone += [path for stem, (path, *_) in masks.items() if stem not in stems]
        return [Record(f"{folder.name}/{f.name}", label, f, masks.get(f.stem, ())) for f in files]

    def _masks(self, part: str, name: str) -> dict[str, tuple[Path, ...]]:
        """Image stem to mask file, for one class folder."""
        folder = self.mask_root and self.mask_root / part / name
        files = by_stem(image_files(folder)) if folder and folder.is_dir() else {}
        return {stem: (path,) for stem, path in files.items()}
