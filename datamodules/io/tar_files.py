"""Splits in tar files with an index: which shard, which bytes, which checksum (the layout of WebDataset, read exactly).

A folder holds `shards.json`, and for every split `<split>.index.npz` with the tar files `<split>-00000.tar`, ... In a
tar file sample 12 is `000000012.png`, its region `000000012.mask.png` and its class `000000012.cls`, so that tools that
read such files in order can read them too. The index lets any process read any sample by itself.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from datamodules.base import ImageDataModule, Split
from datamodules.io.sources import Array, Source
from labn.errors import InputError
from labn.io.atomic import write_atomically, written_atomically

MANIFEST = "shards.json"

FORMAT = 1

PREPARATION_FIELDS = ("image_size", "channels", "crop", "shorter", "caption", "fits_range")
"""What the manifest keeps of how pictures are prepared, beside mean and standard deviation."""

SPAN = np.dtype([("shard", np.int32), ("offset", np.int64), ("size", np.int64), ("crc", np.uint32)])
"""Where the bytes of a picture lie; a size of 0: there is none."""

Fetch = Callable[[str, int, int], bytes]
"""Name of a file of the folder, first byte, byte behind the last -> the bytes between."""


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.npz"


def shard_file(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.tar"


def encode_png(pixels: Array) -> bytes:
    """(H,W,C) uint8 (RGB or grey) or (H,W) bool as a PNG, without loss."""
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    done, data = cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels)
    if not done:
        raise InputError(f"Pixels of shape {pixels.shape} cannot be stored as a PNG.")
    return data.tobytes()


def write_split(source: Source, split: str, folder: Path, samples_per_shard: int) -> int:
    """Write the pixels of a split as its data set prepares them, before augmentation; returns the number of shards."""
    image, mask = np.zeros(len(source), SPAN), np.zeros(len(source), SPAN)
    shards = -(-len(source) // samples_per_shard)
    for number in range(shards):
        part = range(number * samples_per_shard, min((number + 1) * samples_per_shard, len(source)))
        with (
            written_atomically(folder / shard_file(split, number)) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for index in part:
                pixels, region = source.load(index)
                image[index] = (number, *_add_file(tar, f"{index:09d}.png", encode_png(pixels)))
                if region is not None:
                    mask[index] = (number, *_add_file(tar, f"{index:09d}.mask.png", encode_png(region)))
                _add_file(tar, f"{index:09d}.cls", str(int(source.labels[index])).encode())
    arrays = {"image": image, "mask": mask, "label": source.labels, "name": np.array(source.names)}
    if source.groups is not None:
        arrays["group"] = source.groups
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / index_name(split), buffer.getvalue())
    return shards


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int, int]:
    """Offset, size and checksum of what was added."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
    tar.addfile(entry, io.BytesIO(data))
    return offset, len(data), zlib.crc32(data)


def check_storable(data: ImageDataModule) -> None:
    """Compare the samples of a data module with those of the base class, which are all that shards give back.

    Raises:
        ValueError: they have further fields.
    """
    for split in data.splits:
        more = data.dataset(split)[0].keys() - ImageDataModule.dataset(data, split)[0].keys()
        if more:
            raise InputError(
                f"Samples of {type(data).__name__} carry {', '.join(sorted(more))} too, which shards would lose; "
                "shards are for data sets with one class, and at most one region and one group, per image."
            )


def write_shards(data: ImageDataModule, folder: Path, samples_per_shard: int = 1000) -> dict[str, Any]:
    """Write every split of a data module to tar files; the manifest comes last, so that a folder with it is whole.

    Args:
        data: a data module of single images, each with one class and at most one region and one group.
        folder: is made; shards that are there already are written again.
        samples_per_shard: of one tar file.

    Returns:
        The manifest.

    Raises:
        ValueError: `samples_per_shard` is below 1, a picture cannot be read, or samples of `data` have more to them
            than what shards keep, as those of `VOC` have.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard is {samples_per_shard}; it must be at least 1.")
    check_storable(data)
    splits = {}
    for split in data.splits:
        source = data.source(split)
        splits[split] = {
            "samples": len(source),
            "shards": write_split(source, split, folder, samples_per_shard),
            "has_masks": bool(source.has_masks),
            "has_boxes": bool(source.has_boxes),
            "fingerprint": data.fingerprint(split),
        }
    manifest = {
        "format": FORMAT,
        "splits": splits,
        "class_names": list(data.class_names),
        "positive_classes": list(data.positive_classes),
        **{name: getattr(data, name) for name in PREPARATION_FIELDS},
        "mean": [float(value) for value in data.mean],
        "std": [float(value) for value in data.std],
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


class ShardSource(Source):
    """One split, read sample by sample: a process touches the bytes of its own indices only.

    Args:
        where: the folder, for messages.
        fetch: reads a range of bytes of one of its files.
        split: name of the split.
        facts: its entry of the manifest.
        arrays: its index.
    """

    def __init__(self, where: str, fetch: Fetch, split: Split, facts: dict[str, Any], arrays: dict[str, Array]) -> None:
        self.where, self.fetch, self.split = where, fetch, split
        self.image, self.mask, self.names = arrays["image"], arrays["mask"], arrays["name"].tolist()
        self.labels, self.groups = arrays["label"], arrays.get("group")
        self.has_masks, self.has_boxes = bool(facts["has_masks"]), bool(facts["has_boxes"])
        self.identity = ["shards", facts["fingerprint"], zlib.crc32(self.image.tobytes() + self.mask.tobytes())]

    def load(self, index: int) -> tuple[Array, Array | None]:
        """See `Source.load`. Raises `ValueError` naming a shard whose bytes are missing or not those of the index."""
        pixels = self._decoded(self.image[index], index)
        image = np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels[..., None]
        return image, self._decoded(self.mask[index], index) > 0 if self.has_masks else None

    def _decoded(self, span: Any, index: int) -> Array:
        name, start, size = shard_file(self.split, int(span["shard"])), int(span["offset"]), int(span["size"])
        where = f"{self.where}/{name}, sample {index}"
        try:
            data = self.fetch(name, start, start + size)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error}); copy the shard again.") from error
        if len(data) != size or zlib.crc32(data) != int(span["crc"]):
            raise InputError(f"{where}: bytes {start} to {start + size} are not what was written; copy it again.")
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise InputError(f"{where}: cannot be decoded; write the shards again.")
        return pixels


def check_index(where: str, facts: dict[str, Any], arrays: dict[str, Array]) -> list[int]:
    """Compare a split's index with the manifest.

    Returns:
        For every shard the number of bytes that it must have at least.

    Raises:
        ValueError: an array is missing, of another type or length, or points outside of the shards.
    """
    count, kinds = facts["samples"], {"image": SPAN, "mask": SPAN, "label": np.int64, "name": None, "group": np.int64}
    for name, kind in kinds.items():
        held = arrays.get(name)
        if held is None and name == "group":
            continue
        if held is None or held.shape != (count,) or (held.dtype.kind != "U" if kind is None else held.dtype != kind):
            raise InputError(f"{where}: {name} is not an array of {count} entries of the right type; write it again.")
    ends = np.zeros(facts["shards"], dtype=np.int64)
    for name in ("image", "mask"):
        shard, offset, size = (arrays[name][field].astype(np.int64) for field in ("shard", "offset", "size"))
        if count and (min(map(np.min, (shard, offset, size))) < 0 or shard.max() >= len(ends) or size.max() > 2**31):
            raise InputError(f"{where}: {name} points outside of the {len(ends)} shards; write it again.")
        np.maximum.at(ends, shard, offset + size)
    if len(set(arrays["name"].tolist())) != count:
        raise InputError(f"{where}: a name comes twice; write it again.")
    return ends.tolist()
