"""Tar shards give what the data module that wrote them gives, sample by sample, and every damage is named."""

import json
import shutil
import struct
import tarfile
import zlib

import cv2
import fsspec
import numpy as np
import pytest
import torch
from fuzzing import YEARS, picture, write_years

from datamodules import Augmentation, ImageFolder, Magnetogram, TarShards
from datamodules.io.tar_files import MANIFEST, write_shards
from labn.io.images import read_image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of nine pictures with regions, and their shards of four samples each."""
    root = tmp_path_factory.mktemp("pictures")
    for n, name in enumerate(("ant", "bee")):
        for m in range(9):
            picture(root / "data" / name / f"{m}.png", 20 * n + m, side=20 + m)
            picture(root / "masks" / name / f"{m}.png", 40 + m, side=20 + m)
    settings = {"image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "augmentation": Augmentation()}
    folder = ImageFolder(root / "data", mask_root=root / "masks", **settings)
    write_shards(folder, root / "shards", 4)
    return folder, root / "shards"


@pytest.fixture
def shards(pictures, tmp_path):
    """A copy to damage."""
    return shutil.copytree(pictures[1], tmp_path / "shards")


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_samples_of_shards_equal_those_of_the_folder(pictures, split):
    folder, data = pictures[0], TarShards(pictures[1], augmentation=Augmentation())
    assert data.class_names == folder.class_names
    assert data.positive_classes == folder.positive_classes
    assert data.preprocessing() == folder.preprocessing()
    assert data.source(split).names == folder.source(split).names
    assert torch.equal(data.labels(split), folder.labels(split))
    for augment in (False, True):
        for index in range(len(folder.labels(split))):
            key = (index, 3) if augment else index
            same(folder.dataset(split, augment)[key], data.dataset(split, augment)[key])
    assert data.fingerprint(split) != folder.fingerprint(split)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_shards_equal_those_of_the_folder(pictures, workers):
    folder, data = pictures[0], TarShards(pictures[1], batch_size=2, num_workers=workers, augmentation=Augmentation())
    folder.batch_size = 2
    for mine, theirs in (
        (data.test_dataloader(), folder.test_dataloader()),
        (data.train_dataloader(), folder.train_dataloader()),
    ):
        batches = list(mine), list(theirs)
        assert len(batches[0]) == len(batches[1]) > 0
        for first, second in zip(*batches):
            same(first, second)


def test_shards_keep_groups_and_grey_frames(tmp_path):
    (tmp_path / "sun").mkdir()
    write_years(tmp_path / "sun")
    sun = Magnetogram(tmp_path / "sun", image_size=8, **YEARS)
    write_shards(sun, tmp_path / "shards", 3)
    data = TarShards(tmp_path / "shards")
    assert data.channels == 1
    assert torch.equal(data.groups("test"), sun.groups("test"))
    for index in range(4):
        same(sun.dataset("test")[index], data.dataset("test")[index])


def test_shards_at_a_url_are_read_by_byte_ranges(pictures):
    memory = fsspec.filesystem("memory")
    memory.put(str(pictures[1]), "/labn-shards", recursive=True)
    here, there = TarShards(pictures[1]), TarShards("memory://labn-shards")
    for index in range(len(here.labels("test"))):
        same(here.dataset("test")[index], there.dataset("test")[index])
    memory.rm("/labn-shards", recursive=True)
    with pytest.raises(FileNotFoundError, match=r"memory://labn-shards/shards\.json does not exist; write the shards"):
        TarShards("memory://labn-shards")


def test_tar_files_can_be_read_by_tar_and_are_reproducible(pictures, tmp_path):
    write_shards(pictures[0], tmp_path, 4)
    for path in pictures[1].glob("*.tar"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    with tarfile.open(tmp_path / "train-00001.tar") as tar:
        names = tar.getnames()
    assert names[:3] == ["000000004.png", "000000004.mask.png", "000000004.cls"]


def test_loading_a_sample_reads_only_its_bytes(pictures, monkeypatch):
    data = TarShards(pictures[1])
    source = data.source("train")
    read = []
    fetch = source.fetch
    monkeypatch.setattr(source, "fetch", lambda *span: read.append(span) or fetch(*span))
    source.load(5)
    assert read == [
        ("train-00001.tar", *(int(s) for s in (x["offset"], x["offset"] + x["size"])))
        for x in (source.image[5], source.mask[5])
    ]


def cut(root):
    path = root / "test-00000.tar"
    path.write_bytes(path.read_bytes()[:2000])


def flip(root):
    with np.load(root / "test.index.npz") as index:
        place = int(index["image"][0]["offset"]) + 30
    data = bytearray((root / "test-00000.tar").read_bytes())
    data[place] ^= 1
    (root / "test-00000.tar").write_bytes(data)


def change(**changes):
    def work(root):
        content = json.loads((root / MANIFEST).read_text())
        (root / MANIFEST).write_text(json.dumps(content | changes))

    return work


def index(**changes):
    def work(root):
        with np.load(root / "test.index.npz") as file:
            arrays = dict(file)
        np.savez(root / "test.index.npz", **arrays | {name: made(arrays[name]) for name, made in changes.items()})

    return work


def put(root, data, field="image"):
    """Let sample 0 of the test split have these bytes, with the right checksum, as a stranger's shards may."""
    with np.load(root / "test.index.npz") as file:
        arrays = dict(file)
    shard = root / "test-00000.tar"
    arrays[field][0] = (0, shard.stat().st_size, len(data), zlib.crc32(data))
    shard.write_bytes(shard.read_bytes() + data)
    np.savez(root / "test.index.npz", **arrays)


def encoded(pixels, suffix=".png"):
    return cv2.imencode(suffix, pixels)[1].tobytes()


def bomb(width, height):
    """A PNG of a few bytes whose header declares width x height pixels."""
    data = bytearray(encoded(np.zeros((1, 1, 3), np.uint8)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def label(value):
    def made(labels):
        labels[1] = value
        return labels

    return made


def moved(spans):
    spans["shard"] += 9
    return spans


ENTRY = {"samples": 4, "shards": 1, "has_masks": True, "has_boxes": False, "fingerprint": "0"}
DAMAGE = {
    "manifest": (lambda root: (root / MANIFEST).unlink(), FileNotFoundError, r"shards\.json does not exist; write"),
    "nonsense": (lambda root: (root / MANIFEST).write_text("{"), ValueError, r"shards\.json, line 1: not JSON"),
    "format": (change(format=9), ValueError, r"shards\.json is of another format than 1"),
    "field": (change(mean=None), ValueError, r"shards\.json: mean is None"),
    "statistics": (change(std=[0.5]), ValueError, r"shards\.json: channels, image_size, mean and std do not fit"),
    "number": (change(std=[0.0, 1.0, 1.0]), ValueError, r"shards\.json: mean and std must be numbers, std above 0"),
    "preparation": (change(fits_range=5), ValueError, r"shards\.json: crop, shorter, caption or fits_range is damaged"),
    "split": (change(splits={"test": {}}), ValueError, r"shards\.json: the entry of test is damaged"),
    "index": (lambda root: (root / "test.index.npz").unlink(), FileNotFoundError, r"test\.index\.npz does not exist"),
    "length": (index(label=lambda a: a[:-1]), ValueError, r"test\.index\.npz: label is not an array of \d+ entries"),
    "pointer": (index(image=moved), ValueError, r"test\.index\.npz: image points outside of the \d shards"),
    "names": (index(name=lambda a: np.repeat(a[:1], len(a))), ValueError, r"test\.index\.npz: a name comes twice"),
    "shard": (
        lambda root: (root / "test-00000.tar").unlink(),
        FileNotFoundError,
        r"test-00000\.tar does not exist, but",
    ),
    "cut": (cut, ValueError, r"test-00000\.tar is truncated \(2000 of \d+ bytes\); copy it again"),
    "classes": (change(class_names=[]), ValueError, r"shards\.json: class_names must be a list of names"),
    "class": (change(class_names=["a", 3]), ValueError, r"shards\.json: class_names must be a list of names"),
    "positive": (change(positive_classes=[7]), ValueError, r"positive_classes has 7, which is no label of the 2"),
    "positive -1": (change(positive_classes=[-1]), ValueError, r"positive_classes has -1, which is no label"),
    "positive name": (change(positive_classes=["bee"]), ValueError, r"positive_classes has 'bee', which is no label"),
    "side": (change(image_size=2**40), ValueError, r"image_size is 1099511627776; it must be at most 11585"),
    "side of a kind": (change(image_size=True), ValueError, r"shards\.json: image_size is True"),
    "count": (change(splits={"test": {**ENTRY, "shards": 2**40}}), ValueError, r"the entry of test is damaged"),
    "count of a kind": (
        change(splits={"test": {**ENTRY, "samples": "4"}}),
        ValueError,
        r"the entry of test is damaged",
    ),
    **{
        f"label {value}": (index(label=label(value)), ValueError, rf"ant/.* has the label {value}, .*none of the 2 cl")
        for value in (-1, 2**40, 7)
    },
    "pixels": (lambda r: put(r, bomb(2**16, 2**16)), ValueError, r"test-00000\.tar, sample 0 declares .* pixels"),
    "aspect": (lambda r: put(r, bomb(1, 900)), ValueError, r"sample 0 has 1 x 900 pixels; the longer side"),
    "no picture": (lambda r: put(r, b"text"), ValueError, r"test-00000\.tar, sample 0 is not an image; replace"),
    "empty": (lambda r: put(r, b""), ValueError, r"sample 0 is not an image; replace it"),
    "region": (
        lambda r: put(r, encoded(np.ones((3, 3), np.uint8)), "mask"),
        ValueError,
        r"sample 0: the region has \(3, 3\) pixels, its image \(16, 16\)",
    ),
    "flip": (flip, ValueError, r"test-00000\.tar, sample 0: bytes \d+ to \d+ fail the checksum"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_the_error_for_damaged_shards_names_the_file(shards, kind):
    harm, error, message = DAMAGE[kind]
    harm(shards)
    with pytest.raises(error, match=message):
        TarShards(shards).source("test").load(0)


NOISE = np.random.default_rng(0)
KINDS = {
    "16 bits": encoded(NOISE.integers(0, 2**16, (16, 16, 3), dtype=np.uint16)),
    "grey": encoded(NOISE.integers(0, 256, (16, 16), dtype=np.uint8)),
    "grey of 16 bits": encoded(NOISE.integers(0, 2**16, (16, 16), dtype=np.uint16)),
    "alpha": encoded(NOISE.integers(0, 256, (16, 16, 4), dtype=np.uint8)),
    "one bit": encoded(NOISE.integers(0, 2, (16, 16), dtype=np.uint8) * 255),
    "another size": encoded(NOISE.integers(0, 256, (23, 31, 3), dtype=np.uint8)),
    "jpeg": encoded(NOISE.integers(0, 256, (16, 16, 3), dtype=np.uint8), ".jpg"),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_other_kinds_are_read_as_from_a_folder(shards, tmp_path, kind, channels):
    put(shards, KINDS[kind])
    change(channels=channels, mean=[0.5] * channels, std=[0.25] * channels)(shards)
    (tmp_path / "picture").write_bytes(KINDS[kind])
    source = TarShards(shards).source("test")
    source.has_masks = False
    pixels, _ = source.load(0)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, read_image(tmp_path / "picture", channels))
    assert TarShards(shards).dataset("val")[0]["image"].shape == (channels, 16, 16)


@pytest.mark.parametrize("values", [np.uint8, np.uint16])
def test_regions_of_other_kinds_are_read_as_from_a_folder(shards, values):
    region = np.zeros((16, 16, 4), values)
    region[2:5, 3, 1] = 1
    region[..., 3] = np.iinfo(values).max
    put(shards, encoded(region), "mask")
    _, mask = TarShards(shards).source("test").load(0)
    assert np.argwhere(mask).tolist() == [[2, 3], [3, 3], [4, 3]]


def test_a_sample_without_a_region_has_an_empty_one(shards):
    put(shards, b"", "mask")
    _, mask = TarShards(shards).source("test").load(0)
    assert mask.shape == (16, 16)
    assert not mask.any()


def test_zero_samples_per_shard_raise(pictures, tmp_path):
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        write_shards(pictures[0], tmp_path, 0)


def test_shards_with_a_constant_channel_can_be_read(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for m in range(6):
            pixels = np.random.default_rng(m).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            pixels[..., 0] = 0
            assert cv2.imwrite(str(tmp_path / "data" / name / f"{m}.png"), pixels)
    folder = ImageFolder(tmp_path / "data", image_size=16, cache_dir=tmp_path / "cache")
    write_shards(folder, tmp_path / "shards", 4)
    data = TarShards(tmp_path / "shards")
    assert data.std == folder.std
    assert data.std[2] == 1.0
