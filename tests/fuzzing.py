"""Seeded damage to valid files, and what a reader may do about it: read them, or raise a documented error.

A reader passes where it returns or raises `ValueError` or `OSError` with one line that names a file of the data folder,
and opens no file outside of that folder on the way.
"""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from small_stage import make_stage
from small_voc import write_voc

from datamodules import CUB, VOC, IDRiD, ImageFolder, ImageNet, Magnetogram, SyntheticFundus, TarShards
from datamodules.io.tar_files import write_shards
from datamodules.magnetogram import Columns
from labn.io.readers import read_yaml
from labn.report import read_stage
from labn.results.store import ResultStore
from labn.results.training_logs import read_training

TOKENS = [
    *(b"../", b"/etc/passwd", b"..\\", b"C:\\", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n\n"),
    *(b"nan", b"inf", b"-1", b"1e999", b"9" * 400, b"9" * 5000, b"", b"x" * 300, b'"', b",", b",,,,", b";", b" "),
    *(b'<!DOCTYPE a [<!ENTITY x "y">]>', b"&x;", b"<![CDATA[", b"<a>" * 500, b"</annotation>", b"<object/>", b"<!--"),
    *(b"[", b"]", b"{", b"}", b"null", b"[" * 2000, b'{"a":', b"1", b"true", b"NaN", b"\\ud800", b"**", b"[a-", b"*"),
    *(b"NAXIS1  = 99999999", b"BITPIX  = 'a'", b"END", b"'descr': '|O'", b"(1,)", b"fortran_order", b"PK\x03\x04"),
]


def flip(rng: random.Random, data: bytes) -> bytes:
    """Other values for a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Without its end."""
    return data[: rng.randint(0, len(data))]


def drop(rng: random.Random, data: bytes) -> bytes:
    """Without a piece of its middle."""
    start = rng.randint(0, len(data))
    return data[:start] + data[start + rng.randint(1, 40) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """With a token put in, or in place of what was there."""
    start, token = rng.randint(0, len(data)), rng.choice(TOKENS)
    return data[:start] + token + data[start + rng.choice([0, 0, len(token), 3]) :]


def replace_word(rng: random.Random, data: bytes) -> bytes:
    """With a cell or word replaced by a token."""
    marks = [i for i, byte in enumerate(data) if byte in b', \n<>":='] or [0]
    start = rng.choice(marks)
    end = min((mark for mark in marks if mark > start), default=len(data))
    return data[: start + 1] + rng.choice(TOKENS) + data[end:]


def lines(rng: random.Random, data: bytes) -> bytes:
    """With lines repeated, removed or in another order."""
    rows = data.splitlines(keepends=True)
    if rows:
        first, second = rng.randrange(len(rows)), rng.randrange(len(rows))
        rows[first] = rng.choice([rows[second], b"", rows[first] * 2, rows[first] + rows[second]])
    return b"".join(rows)


MUTATIONS = (flip, cut, drop, insert, replace_word, lines)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to three kinds of damage."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        data = rng.choice(MUTATIONS)(rng, data)
    return data


VALUES = (
    None, True, -1, 2**70, 0.5, float("nan"), -1e30, "", "x", "../victim", "/etc/passwd", "..", [], {}, [1, "a"],
    {"a": 1}, (), {3: 4}, b"x",
)  # fmt: skip


def change_state(rng: random.Random, data: bytes) -> bytes:
    """A checkpoint with a few values of its states, or keys, replaced; in one of four rounds, damaged bytes."""
    if rng.random() < 0.25:
        return mutate(rng, data)
    import torch

    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice([1, 1, 2, 4])):
        _change(rng, content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _change(rng: random.Random, tree: dict | list) -> None:
    """Replace, remove or add one value, at any depth."""
    import torch

    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.9:
        _change(rng, tree[key])
        return
    value = rng.choice([*VALUES, torch.ones(2), torch.tensor(float("nan")), torch.zeros(3, 1, dtype=torch.int64)])
    kind = rng.choice(["replace", "replace", "replace", "remove", "add"])
    if kind == "replace":
        tree[key] = value
    elif kind == "remove":
        del tree[key]
    elif isinstance(tree, dict):
        tree[rng.choice([value if isinstance(value, (str, int)) else "x", "step", "load_state_dict"])] = value
    else:
        tree.append(value)


@dataclass(frozen=True)
class Target:
    """A reader with valid files.

    Attributes:
        write: makes the valid files in an empty folder.
        read: reads that folder as the project does.
        patterns: of the files that are damaged.
        damage: from a generator and the bytes of a file to other bytes.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    patterns: tuple[str, ...]
    damage: Callable[[random.Random, bytes], bytes] = mutate


def picture(path: Path, seed: int = 0, side: int = 24) -> None:
    """A small picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)


def write_idrid(root: Path) -> None:
    """Four training and two test images, with lesions of one of them."""
    base = root / "B. Disease Grading"
    for split, folder, count in (("Training", "a. Training Set", 6), ("Testing", "b. Testing Set", 2)):
        for n in range(count):
            picture(base / "1. Original Images" / folder / f"IDRiD_{n:03d}.png", 10 * count + n)
        rows = [f"IDRiD_{n:03d},{n % 5},1,," for n in range(count)]
        table = base / "2. Groundtruths" / f"{folder[:2]} IDRiD_Disease Grading_{split} Labels.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\n".join(["Image name,Retinopathy grade,Risk,,", *rows, ",,,,"]) + "\n")
    header = "segmentation set,segmentation image,grading set,grading image"
    (root / "segmentation_to_grading.csv").write_text(f"{header}\na. Training Set,IDRiD_01,a. Training Set,IDRiD_001\n")
    truth = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set" / "3. Hard Exudates"
    picture(truth / "IDRiD_01_EX.png")


def write_cub(root: Path) -> None:
    """Six birds of two kinds."""
    names = [f"{kind + 1:03d}.Bird/bird_{kind}_{n}.png" for kind in range(2) for n in range(4)]
    for number, name in enumerate(names):
        picture(root / "images" / name, number)
    columns = {
        "images.txt": names,
        "image_class_labels.txt": [1 + n // 4 for n in range(8)],
        "train_test_split.txt": [int(n % 4 < 3) for n in range(8)],
        "bounding_boxes.txt": [f"{n}.5 2.0 10.0 12.0" for n in range(8)],
    }
    for file, values in columns.items():
        (root / file).write_text("".join(f"{n} {value}\n" for n, value in enumerate(values, start=1)))
    (root / "classes.txt").write_text("1 001.Bird\n2 002.Bird\n")


def write_years(root: Path) -> None:
    """Three years of memory maps."""
    for year in (2015, 2016, 2017):
        np.save(root / f"{year}.npy", np.random.default_rng(year).integers(0, 255, (4, 16, 16), dtype=np.uint8))
        rows = [f"hmi.{year}0{1 + n}01_000000,{n}" for n in range(4)]
        (root / f"{year}.csv").write_text("\n".join(["image,flag", *rows]) + "\n")


def write_fits(path: Path) -> None:
    """A FITS image of 8 x 8 pixels."""
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    8", "NAXIS2  =                    8", "BZERO   =                  0.0"]
    cards += [f"DATE-OBS= '{path.stem}-03-01T00:00:00'", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    path.write_bytes(header + np.arange(64, dtype=">i2").tobytes().ljust(2880, b"\0"))


def write_sun(root: Path) -> None:
    """Pictures and FITS files of three years."""
    rows = ["image,flag,when"]
    for year in (2015, 2016, 2017):
        write_fits(root / f"{year}.fits")
        picture(root / f"sun_{year}.png", year)
        rows += [f"{year}.fits,{year % 2},{year}-03-01", f"sun_{year}.png,2,{year}-04-01"]
    (root / "labels.csv").write_text("\n".join(rows) + "\n")


def write_imagenet(root: Path) -> None:
    """Three pictures with a table of their classes."""
    for n in range(3):
        picture(root / "images" / f"val_{n}.png", n)
    rows = ["val_0,n01440764 1 2 3", "val_1,5", "val_2,n01443537"]
    (root / "labels.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")


def write_folder(root: Path) -> None:
    """Two classes of five pictures, of all formats."""
    suffixes = (".png", ".jpg", ".bmp", ".tif", ".webp")
    for n, name in enumerate(("ant", "bee")):
        for m, suffix in enumerate(suffixes):
            picture(root / name / f"{m}{suffix}", 10 * n + m, side=16)


def write_tar(root: Path) -> None:
    """Painted pictures with their lesions in tar shards."""
    write_shards(SyntheticFundus(n_train=4, n_val=2, n_test=2, image_size=48), root, 3)


def write_results(root: Path) -> None:
    """Maps and scores of a test."""
    make_stage(root, count=6)
    store = ResultStore(root / "test")
    for start in (0, 3):
        maps = np.random.default_rng(start).random((3, 4, 4), dtype=np.float32)
        store.add_maps("a", "k", *map(_tensor, (np.arange(start, start + 3), maps)))


def _tensor(values: np.ndarray) -> object:
    import torch

    return torch.from_numpy(values)


def read_images(data: object) -> None:
    """Everything that a data module reads: lists, labels, and the pixels of each sample."""
    for split in ("train", "val", "test"):
        if split in data._sources:
            dataset = data.dataset(split)
            for index in range(len(dataset)):
                dataset[index]


def read_store(root: Path) -> None:
    """What a resumed test reads: damaged shards are computed again, after a warning."""
    store = ResultStore(root / "test")
    store.maps("a", "k", range(12))
    for explainer in ("gradcam", "-lrp"):
        store.scored(explainer, explainer, {"pid16": "pid16"}, range(6))
    list(store.score_shards())


def small(kind: type, **options: object) -> Callable[[Path], None]:
    """Reads a folder with a data module of few pixels."""
    return lambda root: read_images(
        kind(root, image_size=8, mean=[0.5] * kind.channels, std=[0.2] * kind.channels, **options)
    )


def read_run(root: Path) -> None:
    """Reads a run folder, with everything in memory and with its curves on disk."""
    read_training(root)
    read_yaml(root / "fit.yaml")
    for scratch_dir in (root, None):
        read_stage(root / "test", scratch_dir=scratch_dir)


def fit(run_dir: Path, epochs: int, checkpoint: Path | None = None) -> None:
    """Train the smallest network, from a checkpoint if there is one, as the command line does."""
    import lightning.pytorch as pl

    from callbacks.checkpoint import BestCheckpoint, LastCheckpoint, RunCheckpointIO
    from labn.errors import UserError
    from labn.launch.error_messages import restore_error
    from labn.modules import LABN

    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    branch = {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BestCheckpoint(), LastCheckpoint(), pl.callbacks.EarlyStopping("val/loss")],
        plugins=[RunCheckpointIO([run_dir])],
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,
    )
    data = SyntheticFundus(n_train=4, n_val=2, n_test=2, image_size=48, batch_size=2)
    module = LABN("lambda_resnet", split=1, network_options=branch)
    try:
        with redirect_stdout(io.StringIO()):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint and str(checkpoint))
    except UserError:
        raise
    except Exception as error:
        raise restore_error(error, checkpoint) or error from error
    finally:
        log.setLevel(level)


def write_checkpoint(root: Path) -> None:
    """A run of one epoch, and a folder beside it that no checkpoint may change."""
    import torch

    fit(root / "run", 1)
    content = torch.load(root / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "labn.modules.LABN"  # as the command line saves it
    torch.save(content, root / "stranger.ckpt")
    (root / "victim").mkdir()
    (root / "victim" / "precious.txt").write_text("precious")


def read_checkpoint_states(root: Path) -> None:
    """Goes on with a stranger's checkpoint for an epoch, and restores its network."""
    from labn.errors import InputError
    from labn.modules.restore import restore

    try:
        fit(root / "run", 2, root / "stranger.ckpt")
        restore(root / "stranger.ckpt")
    except InputError as error:
        if "loss is nan" not in str(error):  # numbers as such may have any value; the message names the samples
            raise
    finally:
        assert (root / "victim" / "precious.txt").read_text() == "precious"
        assert sorted(path.name for path in root.iterdir()) == ["run", "stranger.ckpt", "victim"]


YEARS = {"train_years": [2015], "val_years": [2016], "test_years": [2017]}
PICTURES = {"labels": "labels.csv", "pictures": ".", "columns": Columns(time="when")}
TARGETS = {
    "idrid": Target(write_idrid, small(IDRiD, cache_images=False, augmentation=None), ("**/*.csv",)),
    "cub": Target(write_cub, small(CUB, resize=8, val_fraction=0.4), ("*.txt",)),
    "voc": Target(write_voc, small(VOC), ("Annotations/*.xml", "ImageSets/Main/*.txt")),
    "years": Target(write_years, small(Magnetogram, **YEARS), ("*.csv", "*.npy")),
    "pictures": Target(write_sun, small(Magnetogram, **YEARS, **PICTURES), ("*.csv", "*.fits")),
    "imagenet": Target(
        write_imagenet,
        lambda root: read_images(ImageNet(root, f"csv:{root}/labels.csv", image_size=8, shorter=9)),
        ("*.csv",),
    ),
    "images": Target(write_folder, small(ImageFolder, val_fraction=0.3, test_fraction=0.3), ("*/*.*",)),
    "tar": Target(write_tar, lambda root: read_images(TarShards(root)), ("shards.json", "*.npz", "*.tar")),
    "stage": Target(
        lambda root: make_stage(root, count=4),
        read_run,
        ("test/*.csv", "test/*.json", "test/maps/*.json", "test/*.npz", "logs/fit/*.csv", "fit.yaml"),
    ),
    "store": Target(write_results, read_store, ("test/maps/*.safetensors", "test/scores/*.npz")),
    "checkpoint": Target(write_checkpoint, read_checkpoint_states, ("stranger.ckpt",), change_state),
}
"""Every reader of files from elsewhere."""


class Opened:
    """Files opened for reading outside of a folder, as the interpreter's audit events tell."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.outside: list[str] = []
        allowed = {
            sys.prefix,
            sys.base_prefix,
            "/usr/lib",
            "/proc",
            "/sys",
            "/dev/null",
            os.path.realpath(Path(__file__).parents[1]),
        }
        self.allowed = tuple(map(str, allowed))
        sys.addaudithook(self._saw)

    def _saw(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]).split("\0")[0])
            if not path.startswith((self.folder, *self.allowed)):
                self.outside.append(path)

    @contextmanager
    def within(self, folder: Path) -> Iterator[None]:
        """Watch a block."""
        self.folder, self.outside = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None


class Fuzzer:
    """Damages the valid files of one reader and lets it read them, again and again.

    Args:
        name: of `TARGETS`.
        folder: empty; the files lie there.
        opened: the watch.
    """

    def __init__(self, name: str, folder: Path, opened: Opened) -> None:
        self.name, self.target, self.opened = name, TARGETS[name], opened
        self.valid, self.work = folder / "valid", folder / "work"
        self.valid.mkdir(parents=True)
        self.target.write(self.valid)
        files = {file for pattern in self.target.patterns for file in self.valid.glob(pattern) if file.is_file()}
        self.files = sorted(files)
        shutil.copytree(self.valid, self.work)
        assert self._read(f"{name}, undamaged") == "read"

    def once(self, seed: str) -> str:
        """One round: `read`, or the name of the documented error.

        Raises:
            AssertionError: another error, a message that is not one line with a file's name, or a file elsewhere.
        """
        rng = random.Random(f"{self.name} {seed}")
        chosen = rng.sample(self.files, k=min(len(self.files), rng.choice([1, 1, 1, 2])))
        damaged = [self.work / file.relative_to(self.valid) for file in chosen]
        for file, path in zip(chosen, damaged):
            path.write_bytes(self.target.damage(rng, file.read_bytes()))
        try:
            return self._read(f"{self.name}, seed {seed}, {', '.join(p.name for p in damaged)}")
        finally:
            for file, path in zip(chosen, damaged):
                shutil.copyfile(file, path)

    def _read(self, where: str) -> str:
        try:
            with warnings.catch_warnings(), self.opened.within(self.work):
                warnings.simplefilter("ignore")
                self.target.read(self.work)
            outcome = "read"
        except (ValueError, OSError) as error:
            outcome, text = type(error).__name__, str(error)
            named = str(self.work) in text or isinstance(error, OSError)
            assert named, f"{where}: {outcome} names no file: {text[:300]!r}"
            assert "\n" not in text.strip(), f"{where}: {outcome} is no one line: {text[:300]!r}"
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        assert not self.opened.outside, f"{where}: opened {self.opened.outside}"
        return outcome

    def run(self, seeds: Iterator[str]) -> Counter[str]:
        """Outcomes of many rounds."""
        return Counter(self.once(seed) for seed in seeds)
