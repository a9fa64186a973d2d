"""TarShards: a data set of this project, written to tar files once and read from a folder or an address."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from datamodules.base import SPLITS, ImageDataModule, Split
from datamodules.io.sources import Source
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


def _valid_preparation(facts: dict[str, Any]) -> bool:
    """Whether what a manifest may leave out is absent, null or of the right kind."""
    given = {name: facts[name] for name in PREPARATION_FIELDS[2:] if facts.get(name) is not None}
    numbers = {"crop": 4, "shorter": 1, "caption": 1, "fits_range": 2}
    return all(
        len(values := value if isinstance(value, list) else [value]) == numbers[name]
        and isinstance(value, list) == (numbers[name] > 1)
        and all(type(number) in (int, float) and math.isfinite(number) for number in values)
        for name, value in given.items()
    )


@dataclass(frozen=True)
class ShardFolder:
    """A folder, or an address of one, whose files are read by ranges of bytes."""

    root: str

    def __call__(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes from `start` to before `end`; the whole file without them."""
        system, folder = self._system()
        return bytes(system.cat_file(f"{folder}/{name}", start=start, end=end))

    def size(self, name: str) -> int:
        """Bytes of a file, -1 where there is none."""
        system, folder = self._system()
        try:
            return int(system.size(f"{folder}/{name}"))
        except FileNotFoundError:
            return -1

    def _system(self) -> tuple[Any, str]:
        # Looked up every time: connections do not survive a fork, and fsspec keeps one per process.
        return fsspec.core.url_to_fs(self.root)


class TarShards(ImageDataModule):
    """A data set in tar shards with an index, as `python cli.py shards` writes them.

    Pixels, labels, masks, groups, order and names are those of the data module that wrote them, so that every score
    and, with its augmentation and seed, every training image is too. Lists of objects (`VOC`) are not kept; writing
    such a data set is refused. A rank or worker reads the bytes of its own samples, each with its
    checksum; no process reads a shard whole, and no split has to fit on a machine.

    Args:
        root: folder of the shards, or an address that fsspec knows (`https://...`, `s3://...`; some need a package
            of their own); `$VARIABLES` are expanded.
        batch_size: see `ImageDataModule`, as for all further arguments.
        num_workers: worker processes per loader.
        seed: of the training order and the augmentation.
        balanced_sampler: class-balanced batches.
        drop_last: leave out an incomplete last training batch.
        augmentation: of the training split; None for none.
        cache_images: keep decoded images in memory.
        cache_dir: folder of the bias image.

    Raises:
        FileNotFoundError: `root` holds no manifest, or a file that it names is missing (when the data is first needed).
        ValueError: manifest, index or a shard is damaged; the message names it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        balanced_sampler: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = PUBLISHED,
        cache_images: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.place = ShardFolder(os.path.expandvars(root).rstrip("/"))
        self._manifest = facts = self._facts()
        self.channels = facts["channels"]
        super().__init__(
            facts["image_size"],
            facts["mean"],
            facts["std"],
            batch_size,
            num_workers,
            seed,
            balanced_sampler,
            drop_last,
            augmentation,
            cache_images=cache_images,
            cache_dir=cache_dir,
        )
        self.class_names, self.positive_classes = facts["class_names"], tuple(facts["positive_classes"])
        self.crop = (c := facts.get("crop")) and (c[0], c[1], c[2], c[3])
        self.fits_range = (r := facts.get("fits_range")) and (r[0], r[1])
        self.shorter, self.caption = facts.get("shorter"), facts.get("caption") or 0.0

    def _facts(self) -> dict[str, Any]:
        with self._local(MANIFEST) as path:
            facts = read_json(path, dict)
        where = f"{self.place.root}/{MANIFEST}"
        for name, kind in _MANIFEST_TYPES.items():
            if not isinstance(facts.get(name), kind):
                raise InputError(f"{where}: {name} is {facts.get(name)!r}; write the shards again.")
        channels, sizes = facts["channels"], (facts["channels"], facts["image_size"])
        numbers = [*facts["mean"], *facts["std"]]
        if channels not in (1, 3) or min(sizes) < 1 or len(facts["mean"]) != channels or len(facts["std"]) != channels:
            raise InputError(f"{where}: channels, image_size, mean and std do not fit; write the shards again.")
        if not all(isinstance(number, float) and math.isfinite(number) for number in numbers) or min(facts["std"]) <= 0:
            raise InputError(f"{where}: mean and std must be numbers, std above 0; write the shards again.")
        if not _valid_preparation(facts):
            raise InputError(f"{where}: crop, shorter, caption or fits_range is damaged; write the shards again.")
        if facts.get("format") != FORMAT or not set(facts["splits"]) <= set(SPLITS):
            raise InputError(f"{where} is of another format than {FORMAT}; write the shards again.")
        return facts

    @contextlib.contextmanager
    def _local(self, name: str) -> Any:
        """Path of a small file of the folder; one at an address is copied meanwhile."""
        where = f"{self.place.root}/{name}"
        if self.place.size(name) < 0:
            raise MissingFileError(f"{where} does not exist; write the shards with `python cli.py shards` first.")
        if "://" not in where:
            yield Path(where)
            return
        with tempfile.TemporaryDirectory(prefix="labn-shards-") as folder:
            (Path(folder) / name).write_bytes(self.place(name))
            yield Path(folder) / name

    def _build(self) -> dict[Split, Source]:
        return {split: self._split(split, facts) for split, facts in self._manifest["splits"].items()}

    def _split(self, split: Split, facts: dict[str, Any]) -> Source:
        root, wanted = self.place.root, ("samples", "shards", "has_masks", "has_boxes", "fingerprint")
        if not isinstance(facts, dict) or not all(isinstance(facts.get(name), (int, str)) for name in wanted):
            raise InputError(f"{root}/{MANIFEST}: the entry of {split} is damaged; write the shards again.")
        with self._local(index_name(split)) as path:
            arrays = read_arrays(path)
        ends = check_index(f"{root}/{index_name(split)}", facts, arrays)
        for number, needed in enumerate(ends):
            name = shard_file(split, number)
            if (size := self.place.size(name)) < 0:
                raise MissingFileError(f"{root}/{name} does not exist, but {index_name(split)} names it; copy it too.")
            if size < needed:
                raise InputError(f"{root}/{name} is truncated ({size} of {needed} bytes); copy it again.")
        return ShardSource(root, self.place, split, facts, arrays)
