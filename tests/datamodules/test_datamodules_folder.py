import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_data import write_image

from datamodules import ImageFolder
from labn.io.images import BadImageError


def folder(root: Path, **options: object) -> ImageFolder:
    options.setdefault("cache_dir", root.parent / "cache")
    return ImageFolder(root, image_size=32, **options)  # type: ignore[arg-type]


def names(data: ImageFolder) -> dict[str, list[str]]:
    return {s: list(data.source(s).names) for s in ("train", "val", "test")}  # type: ignore[arg-type]


def test_flat_folder_is_split_without_overlap(pictures: Path) -> None:
    data = folder(pictures)
    parts = names(data)
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    assert [len(p) for p in parts.values()] == [19, 5, 6]
    assert len(set(sum(parts.values(), []))) == 30  # noqa: RUF017
    assert names(folder(pictures)) == parts
    assert names(folder(pictures, split_seed=1)) != parts
    for split in ("train", "val", "test"):
        labels = data.labels(split).tolist()  # type: ignore[arg-type]
        assert labels == [int(name.startswith("dog/")) for name in parts[split]]


def test_split_folders_are_used_and_validation_is_drawn_from_training(pictures: Path) -> None:
    root = pictures.parent / "given"
    for part, numbers in (("train", range(10)), ("test", range(10, 15))):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in numbers:
                shutil.copy(pictures / name / f"{i:02d}.png", root / part / name)
    parts = names(folder(root))
    assert [len(p) for p in parts.values()] == [16, 4, 10]
    assert all(int(name[4:6]) >= 10 for name in parts["test"])
    shutil.copytree(root / "test", root / "val")
    shutil.copy(pictures / "cat" / "12.png", root / "train" / "dog" / "copy.png")
    data = folder(root)
    with pytest.raises(ValueError, match="val has no image left"):
        data.labels("val")
    write_image(root / "val" / "cat" / "new.png", 999)
    data = folder(root)
    assert names(data)["val"] == ["cat/new.png"]
    assert len(names(data)["train"]) == 20
    assert "dog/copy.png (class 1) is byte-identical to the held-out image cat/12.png (class 0)" in data.report()


@pytest.mark.parametrize(
    ("stage", "shown"), [("fit", ["train", "val", "test"]), ("validate", ["val"]), ("test", ["test"])]
)
def test_a_command_lists_the_splits_that_it_uses(pictures: Path, stage: str, shown: list[str], caplog) -> None:
    with caplog.at_level("INFO"):
        folder(pictures, mean=[0.5] * 3, std=[0.5] * 3).setup(stage)
    assert [line.split(":")[0].strip() for line in caplog.text.splitlines() if " images (" in line] == shown


def test_masks_are_found_by_name(pictures: Path) -> None:
    masks = pictures.parent / "regions"
    write_image(masks / "cat" / "03.png", 1, (30, 50))
    write_image(masks / "dog" / "03.png", 1, (30, 50))
    write_image(masks / "dog" / "03.bmp", 1, (30, 50))
    with pytest.raises(ValueError, match=r"03\.bmp and 03\.png are both image '03'; keep one of them"):
        folder(pictures, mask_root=masks).setup("fit")
    shutil.rmtree(masks / "dog")
    data = folder(pictures, mask_root=masks, augmentation=None)
    seen = {
        data.sample_name(split, int(i)): bool(mask.any())  # type: ignore[arg-type]
        for split in ("train", "val", "test")
        for batch in data.eval_dataloader(split)  # type: ignore[arg-type]
        for i, mask in zip(batch["index"], batch["mask"])
    }
    assert [name for name, found in seen.items() if found] == ["cat/03.png"]
    assert len(seen) == 30


def test_statistics_are_computed_from_training_images_and_cached(pictures: Path) -> None:
    data = folder(pictures, augmentation=None)
    images = np.stack([data.source("train").load(i)[0] for i in range(19)]) / 255
    np.testing.assert_allclose(data.mean, images.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(data.std, images.std((0, 1, 2)), atol=1e-12)
    (file,) = (pictures.parent / "cache").glob("statistics_*.safetensors")
    stamp = file.stat().st_mtime_ns
    assert folder(pictures).mean == data.mean
    assert file.stat().st_mtime_ns == stamp
    batch = next(iter(folder(pictures, batch_size=19, augmentation=None).train_dataloader()))["image"]
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert folder(pictures, mean=[0.5] * 3, std=[0.5] * 3).mean == [0.5] * 3


def test_one_channel_gives_grey_images(pictures: Path) -> None:
    data = folder(pictures, channels=1, mean=[0.5], std=[0.25], cache_images=True)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["image"].shape == (19, 1, 32, 32)
    assert data.bias_image().shape == (1, 32, 32)
    with pytest.raises(ValueError, match="channels is 4; it must be 1"):
        folder(pictures, channels=4)
    with pytest.raises(ValueError, match="`mean` and `std` need 3 numbers each"):
        folder(pictures, mean=[0.5], std=[0.25])


def test_positive_classes_are_given_by_name(pictures: Path) -> None:
    assert folder(pictures).positive_classes == (1,)
    assert folder(pictures, positive_classes=["cat"]).positive_classes == (0,)
    with pytest.raises(ValueError, match="positive_classes has 'cow'; the classes are cat, dog"):
        _ = folder(pictures, positive_classes=["cow"]).positive_classes


@pytest.mark.parametrize(("others", "layer"), [(0, ""), (0, "train"), (1, ""), (1, "test")])
def test_a_root_one_level_too_high_names_the_right_one(tmp_path: Path, others: int, layer: str) -> None:
    for name in ("birds", *["notes"] * others):
        for label in ("cat", "dog"):
            (tmp_path / "all" / name / layer / label).mkdir(parents=True)
            write_image(tmp_path / "all" / name / layer / label / "0.png", 0)
    with pytest.raises(ValueError, match=rf"root {tmp_path / 'all' / 'birds'}(,|\.)"):
        folder(tmp_path / "all").setup("fit")


def test_errors_name_the_problem_of_a_folder(pictures: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        folder(pictures.parent / "absent").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"mask_root .*nowhere does not exist"):
        folder(pictures, mask_root=pictures / "nowhere").setup("fit")
    with pytest.raises(ValueError, match=r"cat holds 0 class folders.*; its images lie .* give root .*/pictures"):
        folder(pictures / "cat").setup("fit")
    (pictures / "emu").mkdir()
    with pytest.raises(ValueError, match=r"emu has no image; remove it"):
        folder(pictures).setup("fit")
    (pictures / "emu" / "1.png").write_text("no picture")
    with pytest.raises(BadImageError, match=r"1\.png is not an image"):
        folder(pictures).setup("fit")
    data = folder(pictures, on_bad_image="skip")
    assert torch.cat([data.labels(s) for s in ("train", "val", "test")]).max() == 1  # type: ignore[arg-type]
    (pictures / "train" / "a").mkdir(parents=True)
    (pictures / "train" / "b").mkdir()
    with pytest.raises(FileNotFoundError, match="has a folder 'train' but no folder 'test'"):
        folder(pictures).setup("fit")
    (pictures / "test" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="test has other class folders than training: a, b are needed"):
        folder(pictures).setup("fit")


def write_splits(root: Path, *parts: str) -> Path:
    for number, part in enumerate(parts):
        for name in ("cat", "dog"):
            for i in range(4):
                write_image(root / part / name / f"{i}.png", 100 * number + 10 * (name == "dog") + i)
    return root


def test_a_folder_with_a_test_alone_is_for_trained_networks(tmp_path: Path) -> None:
    data = folder(write_splits(tmp_path / "given", "test"), mean=[0.5] * 3, std=[0.25] * 3)
    data.setup("test")
    assert data.class_names == ["cat", "dog"]
    assert data.splits == ["val", "test"]
    assert len(data.labels("test")) == 8
    with pytest.raises(ValueError, match="has no train split, only val, test"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"given has no training split to compute mean and std from; .*mean \[0\.485"):
        _ = folder(tmp_path / "given").mean
    shutil.copytree(tmp_path / "given" / "test", tmp_path / "given" / "other")
    assert folder(tmp_path / "given").class_names == ["other", "test"]


@pytest.mark.parametrize("name", ["valid", "Validation", "dev"])
def test_a_split_folder_of_another_name_raises(tmp_path: Path, name: str) -> None:
    root = write_splits(tmp_path / "given", "train", "test", name)
    with pytest.raises(ValueError, match=rf"given/{name} is not read as a split; rename it to train, val or test"):
        folder(root).report()


def test_split_folders_of_other_names_are_not_read_as_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"given holds Test, Train; rename them to train, val and test"):
        _ = folder(write_splits(tmp_path / "given", "Train", "Test")).class_names


def test_other_folders_beside_train_are_noted(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "given", "train", "val", "test")
    shutil.copytree(root / "train", root / "regions" / "train")
    shutil.copytree(root / "train", root / "originals")
    (root / "papers").mkdir()
    report = folder(root, mask_root=root / "regions", mean=[0.5] * 3, std=[0.5] * 3).report()
    assert "left out folder papers beside train" in report
    assert "left out folder originals beside train" in report
    assert "folder regions" not in report


def test_files_of_other_formats_are_counted_in_the_report(pictures: Path) -> None:
    for i in range(3):
        (pictures / "cat" / f"{i}.GIF").touch()
    (pictures / "dog" / "notes.txt").touch()
    (pictures / "dog" / ".hidden").touch()
    (pictures / "dog" / "deeper").mkdir()
    report = folder(pictures, mean=[0.5] * 3, std=[0.5] * 3).report()
    assert "left out 5 entries that are not image files: 3 .gif, 1 .txt, 1 folder" in report


def test_masks_that_fit_no_image_raise(pictures: Path) -> None:
    masks = pictures.parent / "regions"
    for i in range(3):
        write_image(masks / "cat" / f"{i:02d}_mask.png", i)
    with pytest.raises(ValueError, match=r"regions has no mask with the name of an image \(.*00_mask\.png fits none\)"):
        folder(pictures, mask_root=masks).report()
    write_image(masks / "cat" / "00.png", 5)
    report = folder(pictures, mask_root=masks, mean=[0.5] * 3, std=[0.5] * 3).report()
    assert "left out 3 masks without an image, such as" in report
    assert "  1 of 30 images have a mask" in report
    with pytest.raises(ValueError, match=r"cat has no mask with the name of an image \(it has none in the folders"):
        folder(pictures, mask_root=masks / "cat").report()


def test_a_constant_channel_has_a_std_of_1(tmp_path: Path) -> None:
    """Also one whose value is no fraction of a power of two, where a variance made of rounded sums is not 0."""
    for name in ("cat", "dog"):
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (37, 41, 3), dtype=np.uint8)
            pixels[..., 0], pixels[..., 2] = 77, 0
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(tmp_path / "pictures" / name / f"{i}.png"), pixels)
    data = folder(tmp_path / "pictures", batch_size=4)
    assert data.std[::2] == [1.0, 1.0]
    assert 0.1 < data.std[1] < 0.4
    for batch in data.test_dataloader():
        assert batch["image"].isfinite().all()
        assert (batch["image"][:, ::2].abs() < 1e-6).all()


@pytest.mark.parametrize("std", [[0.0, 0.2, 0.2], [0.2, -0.1, 0.2], [0.2, 0.2, float("nan")]])
def test_a_std_that_is_not_above_0_raises(pictures: Path, std: list[float]) -> None:
    with pytest.raises(ValueError, match=r"std is \[.*\]; pixels are divided by it"):
        folder(pictures, mean=[0.5] * 3, std=std)


@pytest.fixture
def latin(pictures: Path) -> Path:
    """The folder with a file whose name is Latin-1."""
    try:
        os.rename(pictures / "cat" / "01.png", os.fsencode(pictures / "cat") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    return pictures


def test_a_file_name_that_is_not_utf8_is_a_bad_image(latin: Path) -> None:
    with pytest.raises(
        BadImageError, match=r"Image cat/caf\\xe9\.png has a name that is not UTF-8 \(rename it\): repl"
    ):
        ImageFolder(latin, image_size=32).report()
    report = ImageFolder(latin, image_size=32, on_bad_image="skip", mean=[0.5] * 3, std=[0.5] * 3).report()
    assert r"skipped cat/caf\xe9.png: Image cat/caf\xe9.png has a name" in report
    report.encode()


def test_a_class_name_that_is_not_utf8_raises_an_error_that_names_it(latin: Path) -> None:
    os.rename(latin / "dog", os.fsencode(latin) + b"/h\xf8nd")
    with pytest.raises(ValueError, match=r"class folder .*/h\\xf8nd is not UTF-8; rename the folder"):
        ImageFolder(latin, image_size=32).report()


def write_classes(root: Path, **counts: int) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i:03d}.png", 1000 * number + i, (8, 9, 3))
    return root


@pytest.mark.parametrize("seed", range(5))
def test_random_splits_are_stratified(tmp_path: Path, seed: int) -> None:
    root = write_classes(tmp_path / "pictures", ant=60, bee=20, cow=3, dog=2)
    data = folder(root, split_seed=seed, mean=[0.5] * 3, std=[0.5] * 3)
    counts = {s: torch.bincount(data.labels(s), minlength=4).tolist() for s in ("train", "val", "test")}  # type: ignore[arg-type]
    assert counts["test"] == [12, 4, 1, 1]
    assert counts["val"][:3] in ([10, 3, 1], [9, 3, 1])
    assert counts["train"][3] == 1
    assert np.sum(list(counts.values()), 0).tolist() == [60, 20, 3, 2]


def test_copies_stay_on_one_side_of_a_stratified_split(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pictures", ant=20, bee=20)
    for i in range(3):
        shutil.copy(root / "ant" / "000.png", root / "ant" / f"copy{i}.png")
        shutil.copy(root / "bee" / "000.png", root / "ant" / f"bee{i}.png")
    for seed in range(10):
        of = {name: split for split, some in names(folder(root, split_seed=seed)).items() for name in some}
        assert len({of[f"ant/{name}.png"] for name in ("000", "copy0", "copy1", "copy2")}) == 1
        assert len({of[name] for name in ("bee/000.png", "ant/bee0.png", "ant/bee1.png", "ant/bee2.png")}) == 1


def test_classes_without_images_are_warned_about_before_training(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pictures", ant=10, bee=10, cow=1)
    data = folder(root, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.warns(UserWarning, match=r"Split test has no image of 1 of 3 classes: cow\."):
        data.setup("fit")
    given = write_classes(tmp_path / "given" / "test", ant=3, bee=3).parent
    write_classes(given / "train", ant=9, bee=0)
    (given / "train" / "bee").mkdir()
    shutil.copy(pictures_error(given / "train" / "bee"), given / "train" / "bee" / "1.png")
    with pytest.warns(UserWarning, match=r"Split train has no image of 1 of 2 classes: bee\."):
        folder(given, on_bad_image="skip", mean=[0.5] * 3, std=[0.5] * 3).setup("fit")


def pictures_error(place: Path) -> Path:
    path = place.parent.parent / "broken"
    path.write_text("no picture")
    return path


def test_all_damaged_images_are_listed_at_once_and_before_setup(pictures: Path) -> None:
    for name in ("cat/03", "cat/07", "dog/11"):
        (pictures / f"{name}.png").write_text("no picture")
    with pytest.raises(BadImageError) as error:
        folder(pictures).prepare_data()
    message = str(error.value)
    assert message.startswith("3 images cannot be read (")
    assert all(f"{name}.png is not an image" in message for name in ("cat/03", "cat/07", "dog/11"))
    for name in ("cat", "dog"):
        for i in range(15):
            (pictures / name / f"{i:02d}.png").write_text("no picture")
    with pytest.raises(BadImageError, match=r"30 images cannot be read .*; and 10 more\): replace them"):
        folder(pictures).prepare_data()


def test_folders_and_images_on_another_disk_can_be_linked(pictures: Path) -> None:
    disk = pictures.parent / "disk"
    shutil.move(pictures / "cat", disk / "cat")
    shutil.move(pictures / "dog" / "04.png", disk / "04.png")
    (pictures / "cat").symlink_to(disk / "cat")
    (pictures / "dog" / "04.png").symlink_to(disk / "04.png")
    linked = pictures.parent / "linked"
    linked.symlink_to(pictures)
    for root in (pictures, linked):
        assert sum(map(len, names(folder(root)).values())) == 30
    with pytest.raises(BadImageError, match=r"16 images cannot be read \(Image .*cat/00\.png is a link that leaves"):
        folder(pictures, strict_links=True).report()


def test_a_link_to_a_file_that_is_not_an_image_is_refused(pictures: Path) -> None:
    (pictures.parent / "secret").write_text("password")
    (pictures / "cat" / "99.png").symlink_to(pictures.parent / "secret")
    with pytest.raises(BadImageError, match=r"cat/99\.png is a link that leaves the data folder .*pictures: replace"):
        folder(pictures).report()


def test_more_than_two_classes_define_an_event_by_name_only(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pictures", ant=4, bee=4, cow=4)
    assert folder(root).event_classes == ()
    assert folder(root).positive_classes == (1, 2)
    assert folder(root, positive_classes=["cow"]).event_classes == (2,)
    assert folder(write_classes(tmp_path / "two", ant=4, bee=4)).event_classes == (1,)
