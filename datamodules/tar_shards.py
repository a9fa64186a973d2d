"""TarShards: a data set that `python cli.py shards` wrote to tar files, read from a folder or a URL."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from datamodules.base import ImageDataModule
from datamodules.io.sources import Source
from datamodules.io.splits import SPLITS, Split
from datamodules.io.tar_files import (
    FORMAT,
    MANIFEST,
    PREPARATION_FIELDS,
    ShardSource,
    check_index,
    index_name,
    shard_file,
)
from datamodules.io.transforms import PUBLISHED, Augmentation
from labn.errors import InputError, MissingFileError
from labn.io.readers import read_arrays, read_json

_MANIFEST_TYPES: dict[str, type] = {
    "splits": dict,
    "class_names": list,
    "positive_classes": list,
    "image_size": int,
    "channels": int,
    "mean": list,
    "std": list,
}


_SPLIT_TYPES = {"samples": int, "shards": int, "has_masks": bool, "has_boxes": bool, "fingerprint": str}


def _valid_preparation(manifest: dict[str, Any]) -> bool:
    """Whether the optional fields of a manifest are absent, null, or finite numbers of the right count."""
    # `image_size` and `channels`, the first two fields, are required and checked elsewhere.
    optional = {name: manifest[name] for name in PREPARATION_FIELDS[2:] if manifest.get(name) is not None}
    numbers = {"crop": 4, "shorter": 1, "caption": 1, "fits_range": 2}
    return all(
        len(values := value if isinstance(value, list) else [value]) == numbers[name]
        and isinstance(value, list) == (numbers[name] > 1)
        and all(type(number) in (int, float) and math.isfinite(number) for number in values)
        for name, value in optional.items()
    )


def _check_classes(where: str, names: list[Any], positive: list[Any]) -> None:
    """Raise InputError unless there are class names, and the positive classes are indices of them."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where}: class_names must be a list of names, one per class; write the shards again.")
    for label in positive:
        if type(label) is not int or not 0 <= label < len(names):
            raise InputError(
                f"{where}: positive_classes has {label!r}, which is no label of the {len(names)} classes; write the "
                "shards again."
            )


@dataclass(frozen=True)
class ShardFolder:
    """A local folder or a URL that fsspec can open, whose files are read by byte ranges.

    Attributes:
        root: path or URL, without a slash at the end.
    """

    root: str

    def __call__(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of file `name` from `start` to before `end`; the whole file by default."""
        system, folder = self._system()
        return bytes(system.cat_file(f"{folder}/{name}", start=start, end=end))

    def size(self, name: str) -> int:
        """Size of a file in bytes; -1 where it does not exist."""
        system, folder = self._system()
        try:
            return int(system.size(f"{folder}/{name}"))
        except FileNotFoundError:
            return -1

    def _system(self) -> tuple[Any, str]:
        # Looked up every time, because connections do not survive a fork; fsspec caches one per process.
        return fsspec.core.url_to_fs(self.root)


class TarShards(ImageDataModule):
    """A data set in tar shards with an index, as `python cli.py shards` or `ImageDataModule.write_shards` writes it.

    Pixels, labels, masks, groups, names and their order are those of the data module that wrote the shards. All scores
    are therefore equal too and, with the same augmentation and seed, all training images. Shards cannot hold lists of
    objects (`VOC`). Every process reads only the bytes of its own samples and compares their checksums, so that a
    split may be larger than memory and disk.

    Args:
        root: folder of the shards, or a URL that fsspec can open (`https://...`, `s3://...`; some protocols need a
            further package); `$VARIABLES` are expanded.
        augmentation: augmentation of the training split; the published one (JSAI 2022) by default.
        kwargs: further arguments of `ImageDataModule`.

    Raises:
        MissingFileError: `root` has no manifest (at once), or a file of the manifest is missing (when the data is
            first used).
        InputError: the manifest (at once), the index or a shard is damaged; the message names the file.

    Example:
        >>> from datamodules import SyntheticFundus
        >>> original = SyntheticFundus(n_train=4, n_val=2, n_test=3, image_size=48)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = original.write_shards(folder, samples_per_shard=2)
        ...     data = TarShards(folder)
        ...     equal = (data.dataset("test")[0]["image"] == original.dataset("test")[0]["image"]).all().item()
        >>> manifest["splits"]["test"]["shards"], data.class_names, equal
        (2, ['healthy', 'lesions'], True)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        augmentation: Augmentation | None = PUBLISHED,
        **kwargs: Any,
    ) -> None:
        self.folder = ShardFolder(os.path.expandvars(root).rstrip("/"))
        self._manifest = manifest = self._read_manifest()
        self.channels = manifest["channels"]
        super().__init__(manifest["image_size"], manifest["mean"], manifest["std"], augmentation=augmentation, **kwargs)
        self.class_names, self.positive_classes = manifest["class_names"], tuple(manifest["positive_classes"])
        self.crop = (c := manifest.get("crop")) and (c[0], c[1], c[2], c[3])
        self.fits_range = (r := manifest.get("fits_range")) and (r[0], r[1])
        self.shorter, self.caption = manifest.get("shorter"), manifest.get("caption") or 0.0

    def _read_manifest(self) -> dict[str, Any]:
        with self._local_copy(MANIFEST) as path:
            manifest = read_json(path, dict)
        where = f"{self.folder.root}/{MANIFEST}"
        for name, kind in _MANIFEST_TYPES.items():
            if type(manifest.get(name)) is not kind:
                raise InputError(f"{where}: {name} is {manifest.get(name)!r}; write the shards again.")
        _check_classes(where, manifest["class_names"], manifest["positive_classes"])
        channels, mean, std = manifest["channels"], manifest["mean"], manifest["std"]
        if channels not in (1, 3) or manifest["image_size"] < 1 or not len(mean) == len(std) == channels:
            raise InputError(f"{where}: channels, image_size, mean and std do not fit; write the shards again.")
        if not all(isinstance(x, float) and math.isfinite(x) for x in [*mean, *std]) or min(std) <= 0:
            raise InputError(f"{where}: mean and std must be numbers, std above 0; write the shards again.")
        if not _valid_preparation(manifest):
            raise InputError(f"{where}: crop, shorter, caption or fits_range is damaged; write the shards again.")
        if manifest.get("format") != FORMAT or not set(manifest["splits"]) <= set(SPLITS):
            raise InputError(f"{where} is of another format than {FORMAT}; write the shards again.")
        return manifest

    @contextlib.contextmanager
    def _local_copy(self, name: str) -> Any:
        """Path of a small file of the folder; a file behind a URL is copied to a temporary folder."""
        where = f"{self.folder.root}/{name}"
        if self.folder.size(name) < 0:
            raise MissingFileError(f"{where} does not exist; write the shards with `python cli.py shards` first.")
        if "://" not in where:
            yield Path(where)
            return
        with tempfile.TemporaryDirectory(prefix="labn-shards-") as folder:
            (Path(folder) / name).write_bytes(self.folder(name))
            yield Path(folder) / name

    def _build(self) -> dict[Split, Source]:
        return {split: self._read_split(split, facts) for split, facts in self._manifest["splits"].items()}

    def _read_split(self, split: Split, facts: dict[str, Any]) -> Source:
        root = self.folder.root
        right = isinstance(facts, dict) and all(type(facts.get(name)) is kind for name, kind in _SPLIT_TYPES.items())
        if not right or not 0 <= facts["shards"] <= facts["samples"]:
            raise InputError(f"{root}/{MANIFEST}: the entry of {split} is damaged; write the shards again.")
        with self._local_copy(index_name(split)) as path:
            arrays = read_arrays(path)
        ends = check_index(f"{root}/{index_name(split)}", facts, arrays)
        for number, needed in enumerate(ends):
            name = shard_file(split, number)
            if (size := self.folder.size(name)) < 0:
                raise MissingFileError(f"{root}/{name} does not exist, but {index_name(split)} names it; copy it too.")
            if size < needed:
                raise InputError(f"{root}/{name} is truncated ({size} of {needed} bytes); copy it again.")
        return ShardSource(root, self.folder, split, facts, arrays, self.channels)
