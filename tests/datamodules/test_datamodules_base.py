"""The batch contract, determinism, sharding and the bias image, on every data module that needs no real data."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel
from small_data import write_image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import IDRiD, ImageDataModule, ImageFolder, SyntheticFundus
from datamodules.base import Split
from datamodules.io import sources
from datamodules.io.sources import ArraySource, Source
from datamodules.io.statistics import cached
from datamodules.io.transforms import FLIPS, PUBLISHED

Make = Callable[..., ImageDataModule]


@pytest.fixture(params=["synthetic", "idrid", "folder"])
def make(request: pytest.FixtureRequest, tmp_path: Path, small_idrid: Path, pictures: Path) -> Make:
    def build(**options: object) -> ImageDataModule:
        options = {"cache_dir": tmp_path / "cache", "batch_size": 4, **options}
        if request.param == "synthetic":
            return SyntheticFundus(n_train=9, n_val=4, n_test=7, **options)  # type: ignore[arg-type]
        if request.param == "idrid":
            return IDRiD(root=small_idrid, image_size=32, **options)  # type: ignore[arg-type]
        return ImageFolder(pictures, image_size=32, **options)  # type: ignore[arg-type]

    return build


def run_epoch(data: ImageDataModule, epoch: int) -> dict[int, Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return {int(i): x for batch in loader for i, x in zip(batch["index"], batch["image"])}


def test_batches_have_the_documented_fields_shapes_and_types(make: Make) -> None:
    data = make()
    data.setup("fit")
    data.setup("test")
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        batch = next(iter(loader))
        size = len(batch["label"])
        assert batch["image"].shape == (size, data.channels, data.image_size, data.image_size)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert torch.equal(batch["label"], data.labels(split)[batch["index"]])
        assert ("mask" in batch) == data.has_masks(split)
    assert torch.cat([b["index"] for b in data.test_dataloader()]).tolist() == list(range(len(data.labels("test"))))
    names = [data.sample_name("test", i) for i in range(len(data.labels("test")))]
    assert len(set(names)) == len(names)
    assert data.num_classes == len(data.class_names)
    with pytest.raises(ValueError, match="split is 'eval'; it must be one of train, val, test"):
        data.labels("eval")  # type: ignore[arg-type]


def test_augmentation_does_not_depend_on_workers_or_batch_size(make: Make) -> None:
    options = {"augmentation": PUBLISHED}
    reference = [run_epoch(make(**options), epoch) for epoch in (0, 3)]
    data = make(num_workers=2, **options)
    data.batch_size = 3
    loader = data.train_dataloader()
    for epoch, expected in zip((0, 3), reference):
        # The same persistent workers serve both epochs.
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        drawn = {int(i): x for batch in loader for i, x in zip(batch["index"], batch["image"])}
        assert drawn.keys() == expected.keys()
        assert all(torch.equal(drawn[i], expected[i]) for i in drawn)
    assert any(not torch.equal(reference[0][i], reference[1][i]) for i in reference[0])
    other = run_epoch(make(seed=43, **options), 0)
    assert any(not torch.equal(reference[0][i], other[i]) for i in other)


def test_ranks_divide_the_samples_without_changing_pixels(make: Make) -> None:
    whole = make()
    for split in ("val", "test"):
        expected = {int(i): x for b in whole.eval_dataloader(split) for i, x in zip(b["index"], b["image"])}
        for world in range(2, len(expected) + 1):
            seen: list[int] = []
            for rank in range(world):
                data = make()
                data.trainer = SimpleNamespace(world_size=world, global_rank=rank)  # type: ignore[assignment]
                for batch in data.eval_dataloader(split):  # type: ignore[arg-type]
                    seen += batch["index"].tolist()
                    assert all(torch.equal(x, expected[int(i)]) for i, x in zip(batch["index"], batch["image"]))
            assert sorted(seen) == sorted(expected)


def ranks_of(make: Make, world: int, copes: bool) -> list[DataLoader]:
    """The test loader of every rank, under a module that does or does not cope with a rank without a batch."""
    loaders = []
    for rank in range(world):
        data = make()
        module = SimpleNamespace(allow_zero_length_dataloader_with_multiple_devices=copes)
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank, lightning_module=module)  # type: ignore[assignment]
        loaders.append(data.test_dataloader())
    return loaders


def test_a_rank_without_samples_runs_an_epoch_without_batches(make: Make) -> None:
    count = len(make().labels("test"))
    loaders = ranks_of(make, count + 2, copes=True)
    assert [[i for batch in loader for i in batch["index"].tolist()] for loader in loaders] == [
        *([i] for i in range(count)),
        [],
        [],
    ]
    assert [len(loader) for loader in loaders] == [1] * (count + 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_loader_length_of_every_rank_is_that_of_rank_zero(make: Make, world: int) -> None:
    loaders = ranks_of(make, world, copes=False)
    assert {len(loader) for loader in loaders} == {len(list(loaders[0]))}
    assert all(len(list(loader)) <= len(loader) for loader in loaders)


def test_more_processes_than_samples_raise_for_a_module_that_logs_in_its_steps(make: Make) -> None:
    count = len(make().labels("test"))
    message = f"Split test has {count} images for {count + 1} processes; use at most {count} processes, or a module"
    with pytest.raises(ValueError, match=message):
        ranks_of(make, count + 1, copes=False)


def test_train_ranks_are_disjoint_and_equally_long(make: Make) -> None:
    shares = []
    for rank in range(2):
        data = make()
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        shares.append([int(i) for batch in data.train_dataloader() for i in batch["index"]])
    n = len(data.labels("train"))
    assert len(shares[0]) == len(shares[1]) == (n + 1) // 2
    assert set(shares[0]) | set(shares[1]) == set(range(n))


def test_validation_and_test_are_never_augmented(make: Make) -> None:
    data = make(augmentation=PUBLISHED)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    for split in ("val", "test"):
        for batch in data.eval_dataloader(split):  # type: ignore[arg-type]
            for i, image in zip(batch["index"], batch["image"]):
                pixels = torch.from_numpy(np.array(data.source(split).load(int(i))[0])).permute(2, 0, 1) / 255  # type: ignore[arg-type]
                torch.testing.assert_close(image * std + mean, pixels, atol=1e-5, rtol=0)


def test_balanced_batches_are_drawn_without_decoding_an_image(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(balanced_sampler=True)
    source, _ = data.source("train"), data.mean
    monkeypatch.setattr(type(source), "load", lambda self, index: pytest.fail("an image was decoded"))
    loader = data.train_dataloader()
    assert len(loader) >= 1
    for key in (keys := list(loader.sampler)):  # type: ignore[arg-type]
        assert key.epoch == 0
    assert data.labels("train")[[k.sample for k in keys[:4]]].tolist().count(1) == 2


def test_bias_image_is_exact_and_cached(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(augmentation=PUBLISHED)
    images = np.stack([data.source("train").load(i)[0] for i in range(len(data.labels("train")))])
    exact = torch.from_numpy(images.astype(np.int64).sum(0) / (255 * len(images))).permute(2, 0, 1)
    bias = data.bias_image()
    assert bias.dtype == torch.float32
    assert torch.equal(bias, exact.float())
    (file,) = (tmp_path / "cache").glob("bias_*")
    assert data.fingerprint("train") in file.name
    again = make(augmentation=None)
    monkeypatch.setattr(type(again.source("train")), "load", lambda self, index: pytest.fail("computed again"))
    assert torch.equal(again.bias_image(), bias)


def test_a_damaged_bias_file_is_replaced(make: Make, tmp_path: Path) -> None:
    wanted = make().bias_image()
    (file,) = (tmp_path / "cache").glob("bias_*")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=r"bias_.* is damaged \(.*\); it is computed again"):
        assert torch.equal(make().bias_image(), wanted)
    assert torch.equal(make().bias_image(), wanted)


def test_different_data_has_a_different_fingerprint_and_bias_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        SyntheticFundus(n_train=4, data_seed=seed, cache_dir=tmp_path).bias_image()
    assert len(list(tmp_path.glob("bias_*"))) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_fingerprint_changes_with_labels_files_and_settings(small_idrid: Path) -> None:
    def prints(**options: object) -> str:
        return IDRiD(root=small_idrid, image_size=32, **options).fingerprint("test")  # type: ignore[arg-type]

    first = prints()
    assert first == prints(seed=1, batch_size=2, augmentation=None)
    assert len({first, prints(crop=None), prints(task="grades")}) == 3
    assert IDRiD(root=small_idrid, image_size=48).fingerprint("test") != first
    data = IDRiD(root=small_idrid, image_size=32)
    data.setup("test")
    assert data.fingerprint("test") == first
    (image,) = small_idrid.rglob("b. Testing Set/IDRiD_002.jpg")
    write_image(image, 5, (50, 60, 3))
    assert prints() != first


@pytest.mark.parametrize(("world", "batch_size"), [(1, 10), (2, 6), (4, 4)])
def test_dropping_the_only_training_batch_raises(world: int, batch_size: int) -> None:
    data = SyntheticFundus(n_train=9, n_val=4, n_test=4, batch_size=batch_size, drop_last=True)
    data.trainer = SimpleNamespace(world_size=world, global_rank=0)  # type: ignore[assignment]
    message = f"leaves no batch of 9 images with batch_size {batch_size} on each of {world} processes"
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()
    data.batch_size -= 1
    assert len(data.train_dataloader()) == 1


class _Forgetful(ImageDataModule):
    """Names no setting in the identity of its source."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"image_size": 8, "mean": None, "std": None, **settings})  # type: ignore[arg-type]
        self.class_names = ["a", "b"]

    def _build(self) -> dict[Split, Source]:
        pixels = [np.zeros((8, 8, 3), np.uint8)]
        return {"test": ArraySource(["x"], np.zeros(1, np.int64), pixels, None, ["forgetful"])}


def test_the_data_hash_of_every_data_module_includes_all_settings_that_change_pixels() -> None:
    prints = [_Forgetful(image_size=size).fingerprint("test") for size in (8, 16)]
    for name, value in (("crop", (0.1, 0.0, 1.0, 1.0)), ("shorter", 9)):
        data = _Forgetful()
        setattr(data, name, value)
        prints.append(data.fingerprint("test"))
    assert len(set(prints)) == 4


@pytest.mark.parametrize("masks", [False, True])
def test_the_fingerprint_differs_for_files_of_equal_name_and_size(tmp_path: Path, masks: bool) -> None:
    def build(root: Path, shade: int) -> ImageFolder:
        for name in ("cat", "dog"):
            for n in range(6):
                (root / "masks" / name).mkdir(parents=True, exist_ok=True)
                (root / "data" / name).mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng([n, len(name)]).integers(0, 50, (16, 16, 3)) + (0 if masks else shade)
                cv2.imwrite(str(root / "data" / name / f"{n}.bmp"), pixels.astype(np.uint8))
                cv2.imwrite(str(root / "masks" / name / f"{n}.bmp"), np.full((16, 16), shade, np.uint8))
        options = {"mask_root": root / "masks"} if masks else {}
        return ImageFolder(root / "data", image_size=16, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    dark, bright, copy_of_dark = build(tmp_path / "a", 0), build(tmp_path / "b", 200), build(tmp_path / "c", 0)
    assert dark.fingerprint("train") == copy_of_dark.fingerprint("train") != bright.fingerprint("train")
    if not masks:
        assert [m + 200 / 255 for m in dark.mean] == pytest.approx(bright.mean, abs=1e-9)
        torch.testing.assert_close(dark.bias_image() + 200 / 255, bright.bias_image(), atol=0.05, rtol=0)


def test_the_fingerprint_reads_the_files_only_once(small_idrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = IDRiD(root=small_idrid, image_size=32, cache_images=False)
    first = data.fingerprint("test")
    monkeypatch.setattr(sources, "content_hash", lambda path: pytest.fail("read again"))
    assert data.fingerprint("test") == first


@pytest.mark.parametrize("name", ["image_size", "batch_size"])
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_below_one_raise(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        ImageFolder("/absent", **{name: value})  # type: ignore[arg-type]


WRONG_CROPS = [
    (290, 0, 3701, 2849),
    (0, 0, 3701, 2849),
    (0.5, 0.0, 0.4, 1.0),
    (0.0, 0.3, 1.0, 0.3),
    (1.1, 0.0, 1.5, 1.0),
    (float("nan"), 0.0, 1.0, 1.0),
]


@pytest.mark.parametrize("crop", WRONG_CROPS)
@pytest.mark.parametrize("kind", [ImageFolder, IDRiD])
def test_an_empty_crop_and_a_crop_in_pixels_raise(kind: type[ImageDataModule], crop: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"crop is \(.*\); it must be left, top, right, bottom in fractions of width"):
        kind(root="/absent", crop=crop)  # type: ignore[call-arg]


def test_a_crop_narrower_than_a_pixel_raises_one_sentence(pictures: Path) -> None:
    data = ImageFolder(pictures, image_size=32, crop=(0.5, 0.0, 0.501, 1.0), mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match=r"crop \(0.5, .*\) leaves no pixel of an image of 50 x \d+; widen it"):
        data.dataset("test")[0]


def test_an_unwritable_cache_warns_and_the_bias_image_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        value = cached(tmp_path / "file" / "x.safetensors", lambda: torch.ones(2))
    assert value.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["IDRiD", "SyntheticFundus", "ImageFolder"])
def test_a_yaml_configuration_builds_the_data_module(name: str, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    steps = "{rotation: 0, crop_scale: null, erasing: 0.25}"
    extra = f", root: {tmp_path}" if name != "SyntheticFundus" else ""
    text = f"data: {{class_path: datamodules.{name}, init_args: {{image_size: 64, augmentation: {steps}{extra}}}}}"
    data = parser.instantiate_classes(parser.parse_string(text)).data
    assert data.image_size == 64
    default = FLIPS if name == "SyntheticFundus" else PUBLISHED
    assert data.augmentation == replace(default, rotation=0, crop_scale=None, erasing=0.25)
    plain = parser.parse_string(f"data: {{class_path: datamodules.{name}, init_args: {{batch_size: 8{extra}}}}}")
    assert parser.instantiate_classes(plain).data.batch_size == 8
    none = parser.parse_string(f"data: {{class_path: datamodules.{name}, init_args: {{augmentation: null{extra}}}}}")
    assert parser.instantiate_classes(none).data.augmentation is None


class _Seen(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 2)
        self.train_images: list[Tensor] = []
        self.test_indices: list[int] = []

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:  # type: ignore[override]
        self.train_images.append(batch["image"].clone())
        return self.layer(batch["image"][:, 0, 0]).mean()

    def validation_step(self, batch: dict[str, Tensor], step: int) -> None:  # type: ignore[override]
        pass

    def test_step(self, batch: dict[str, Tensor], step: int) -> None:  # type: ignore[override]
        self.test_indices += batch["index"].tolist()


def _trainer(root: Path, epochs: int, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, default_root_dir=root, **quiet, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("own_sampler", [True, False])
def test_a_resumed_training_sees_the_same_images(tmp_path: Path, own_sampler: bool) -> None:
    data = SyntheticFundus(n_train=10, n_val=4, n_test=7, batch_size=4, augmentation=PUBLISHED)
    whole = _Seen()
    _trainer(tmp_path, 3, use_distributed_sampler=own_sampler).fit(whole, data)
    first = _Seen()
    trainer = _trainer(tmp_path, 2)
    trainer.fit(first, copy.deepcopy(data))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rest = _Seen()
    _trainer(tmp_path, 3).fit(rest, copy.deepcopy(data), ckpt_path=tmp_path / "last.ckpt")
    assert len(first.train_images) == 6
    resumed = first.train_images + rest.train_images
    assert len(resumed) == len(whole.train_images) == 9
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole.train_images))
    _trainer(tmp_path, 1, use_distributed_sampler=own_sampler).test(whole, data, verbose=False)
    assert whole.test_indices == list(range(7))


@pytest.mark.parametrize("name", ["CUB", "IDRiD", "ImageFolder", "ImageNet", "Magnetogram", "VOC"])
def test_the_help_of_a_data_module_shows_the_arguments_of_its_base(name, capsys):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help=datamodules.{name}"])
    text = " ".join(capsys.readouterr().out.split())
    arguments = set(inspect.signature(ImageDataModule).parameters) - ({"balanced_sampler"} if name == "VOC" else set())
    assert all(f"--data.{argument} " in text for argument in arguments)
    assert "samples per batch and process" in text
