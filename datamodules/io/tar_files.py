"""Splits in tar files with an index of shard, byte range and checksum of every sample (the layout of WebDataset).

A folder holds the manifest `shards.json` and, for every split, the index `<split>.index.npz` and the tar files
`<split>-00000.tar`, `<split>-00001.tar`, ... Sample 12 is stored as `000000012.png`, its region as `000000012.mask.png`
and its class as `000000012.cls`, so that WebDataset tools, which read tar files in order, can read them too. With the
index, any process can read any single sample.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from datamodules.io.sources import Array, Source
from datamodules.io.splits import Split
from labn.errors import InputError
from labn.io.atomic import write_atomically, written_atomically
from labn.io.images import MAX_BYTES, decode_image, decode_mask

MANIFEST = "shards.json"

FORMAT = 1

PREPARATION_FIELDS = ("image_size", "channels", "crop", "shorter", "caption", "fits_range")
"""Settings of the picture preparation that the manifest stores beside mean and standard deviation."""

SPAN = np.dtype([("shard", np.int32), ("offset", np.int64), ("size", np.int64), ("crc", np.uint32)])
"""Shard number, byte range and CRC-32 of a picture; a size of 0 means that the sample has no such picture."""

Fetch = Callable[[str, int, int], bytes]
"""(file name, start, end) -> the bytes from `start` to before `end`."""


class Storable(Protocol):
    """The attributes of `ImageDataModule` that are written to shards."""

    class_names: list[str]
    positive_classes: tuple[int, ...]

    @property
    def splits(self) -> list[Split]:
        """Names of the splits."""

    @property
    def mean(self) -> list[float]:
        """Mean of each channel."""

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel."""

    def source(self, split: Split) -> Source:
        """The source of a split."""

    def fingerprint(self, split: Split) -> str:
        """Data hash of a split."""

    def check_storable(self) -> None:
        """Raise InputError for samples with further fields than shards can hold."""


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.npz"


def shard_file(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.tar"


def encode_png(pixels: Array) -> bytes:
    """A lossless PNG of (H,W,C) uint8 (RGB or grey) or of (H,W) bool."""
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    # OpenCV expects BGR.
    done, data = cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels)
    if not done:
        raise InputError(f"Pixels of shape {pixels.shape} cannot be stored as a PNG.")
    return data.tobytes()


def write_split(source: Source, split: str, folder: Path, samples_per_shard: int) -> int:
    """Write the samples of a split, prepared and not augmented, and their index; return the number of shards."""
    image, mask = np.zeros(len(source), SPAN), np.zeros(len(source), SPAN)
    shards = -(-len(source) // samples_per_shard)
    for number in range(shards):
        indices = range(number * samples_per_shard, min((number + 1) * samples_per_shard, len(source)))
        with (
            written_atomically(folder / shard_file(split, number)) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for index in indices:
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
    """Add a file to a tar archive; return offset, size and CRC-32 of its data."""
    # A default `TarInfo` has time stamp, owner and mode fixed, so that equal samples give equal tar files.
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    # The data follows one header block.
    offset = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
    tar.addfile(entry, io.BytesIO(data))
    return offset, len(data), zlib.crc32(data)


def write_shards(data: Storable, folder: Path, samples_per_shard: int = 1000) -> dict[str, Any]:
    """Write every split of a data module to tar files; see `ImageDataModule.write_shards`.

    Raises:
        InputError: `samples_per_shard` is below 1, a picture cannot be read, or samples have fields that shards cannot
            hold.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard is {samples_per_shard}; it must be at least 1.")
    data.check_storable()
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
    # The manifest comes last: a folder that has one is complete.
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


class ShardSource(Source):
    """A split in tar shards, read sample by sample: a process reads only the bytes of its own samples.

    Args:
        where: the folder of the shards, for error messages.
        fetch: reads a byte range of one of the folder's files.
        split: name of the split.
        facts: the split's entry in the manifest.
        arrays: the arrays of the split's index.
        channels: 3 (RGB) or 1 (grey); shards that another program wrote may hold pictures of any kind.
    """

    def __init__(
        self,
        where: str,
        fetch: Fetch,
        split: Split,
        facts: dict[str, Any],
        arrays: dict[str, Array],
        channels: int = 3,
    ) -> None:
        self.where, self.fetch, self.split, self.channels = where, fetch, split, channels
        self.image, self.mask, self.names = arrays["image"], arrays["mask"], arrays["name"].tolist()
        self.labels, self.groups = arrays["label"], arrays.get("group")
        self.has_masks, self.has_boxes = bool(facts["has_masks"]), bool(facts["has_boxes"])
        self.identity = ["shards", facts["fingerprint"], zlib.crc32(self.image.tobytes() + self.mask.tobytes())]

    def load(self, index: int) -> tuple[Array, Array | None]:
        """See `Source.load`.

        Raises:
            InputError: the bytes of the sample are missing, or differ from the checksum of the index, or the region
                has another size than the image; the message names the shard.
            BadImageError: the picture declares a size out of range, or cannot be decoded.
        """
        data, where = self._content(self.image[index], index)
        image = decode_image(data, where, self.channels)
        if not self.has_masks:
            return image, None
        if not int(self.mask[index]["size"]):
            return image, np.zeros(image.shape[:2], dtype=bool)
        data, where = self._content(self.mask[index], index)
        mask = decode_mask(data, where)
        if mask.shape != image.shape[:2]:
            raise InputError(
                f"{where}: the region has {mask.shape} pixels, its image {image.shape[:2]}; write it again."
            )
        return image, mask

    def _content(self, span: Any, index: int) -> tuple[bytes, str]:
        """The bytes of a picture, and the name of the shard and the sample for messages."""
        name, start, size = shard_file(self.split, int(span["shard"])), int(span["offset"]), int(span["size"])
        where = f"{self.where}/{name}, sample {index}"
        try:
            data = self.fetch(name, start, start + size)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error}); copy the shard again.") from error
        if len(data) != size or zlib.crc32(data) != int(span["crc"]):
            raise InputError(f"{where}: bytes {start} to {start + size} fail the checksum; copy the shard again.")
        return data, where


def check_index(where: str, facts: dict[str, Any], arrays: dict[str, Array]) -> list[int]:
    """Compare the index of a split with its entry in the manifest.

    Returns:
        The smallest size in bytes that each shard must have.

    Raises:
        InputError: an array is missing, has another type or length, or points outside the shards.
    """
    count, kinds = facts["samples"], {"image": SPAN, "mask": SPAN, "label": np.int64, "name": None, "group": np.int64}
    for name, kind in kinds.items():
        array = arrays.get(name)
        if array is None and name == "group":
            continue
        right_type = array is not None and (array.dtype.kind == "U" if kind is None else array.dtype == kind)
        if array is None or array.shape != (count,) or not right_type:
            raise InputError(f"{where}: {name} is not an array of {count} entries of the right type; write it again.")
    ends = np.zeros(facts["shards"], dtype=np.int64)
    for name in ("image", "mask"):
        shard, offset, size = (arrays[name][field].astype(np.int64) for field in ("shard", "offset", "size"))
        if count and (
            min(map(np.min, (shard, offset, size))) < 0 or shard.max() >= len(ends) or size.max() > MAX_BYTES
        ):
            raise InputError(f"{where}: {name} points outside of the {len(ends)} shards; write it again.")
        np.maximum.at(ends, shard, offset + size)
    if len(set(arrays["name"].tolist())) != count:
        raise InputError(f"{where}: a name comes twice; write it again.")
    return ends.tolist()
