from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.io import savemat
from small_data import write_image

from datamodules import ImageNet

SYNSETS = ("n01440764", "n01530575", "n15075141")  # tench, brambling, toilet tissue: the first, number 10, the last
CLASSES = [0, 10, 999]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Three pictures in one folder, their names beginning with a synset."""
    for seed, synset in enumerate(SYNSETS):
        write_image(tmp_path / "val" / f"{synset}_{seed}.png", seed, shape=(300, 400, 3))
    return tmp_path


def test_the_validation_images_are_the_val_and_the_test_split(tmp_path: Path) -> None:
    for seed, synset in enumerate(SYNSETS):
        for number in range(2):
            write_image(tmp_path / "val" / synset / f"ILSVRC2012_val_{seed}{number}.png", seed)
    data = ImageNet(tmp_path)
    data.setup("test")
    assert data.num_classes == 1000
    assert [data.class_names[c] for c in CLASSES] == ["tench", "brambling", "toilet tissue"]
    for split in ("val", "test"):
        assert data.labels(split).tolist() == [0, 0, 10, 10, 999, 999]
        assert data.sample_name(split, 3) == "n01530575/ILSVRC2012_val_11.png"
    (batch,) = data.test_dataloader()
    assert batch["image"].shape == (6, 3, 224, 224)
    assert batch["index"].tolist() == list(range(6))
    assert "test: 6 images (3 of 1000 classes)" in data.report()
    assert "train" not in data.report()


def test_imagenet_has_no_training_split(flat: Path) -> None:
    with pytest.raises(ValueError, match="ImageNet has no train split, only val, test"):
        ImageNet(flat).train_dataloader()
    with pytest.raises(ValueError, match="ImageNet has no train split"):
        ImageNet(flat).bias_image()


def test_pixels_are_the_centre_of_the_resized_image(tmp_path: Path) -> None:
    ramp = np.zeros((64, 96, 3), dtype=np.uint8)
    ramp[..., 2] = np.arange(96)  # red, in OpenCV's order
    (tmp_path / "val").mkdir()
    cv2.imwrite(str(tmp_path / "val" / "n01440764_0.png"), ramp)
    whole = ImageNet(tmp_path, image_size=32, shorter=64, mean=[0.0] * 3, std=[1.0] * 3).dataset("test")[0]["image"]
    assert torch.allclose(whole[0] * 255, torch.arange(32.0, 64.0).expand(32, 32), atol=1e-4)
    assert not whole[1:].any()
    halved = ImageNet(tmp_path, image_size=32, shorter=32, mean=[0.0] * 3, std=[1.0] * 3).dataset("test")[0]["image"]
    # 96 columns become 48, of which the middle 32 are 8 to 39; each averages two of the ramp.
    expected = 2 * torch.arange(8.0, 40.0) + 0.5
    assert torch.allclose(halved[0] * 255, expected.expand(32, 32), atol=0.51)


def test_class_rules_give_the_labels(flat: Path) -> None:
    assert ImageNet(flat).labels("test").tolist() == CLASSES
    assert ImageNet(flat, class_rule="every:7").labels("test").tolist() == [0, 7, 14]
    table = flat / "solution.csv"
    rows = [f"n01440764_0,{SYNSETS[1]} 10 20 30 40", f"n01530575_1,{SYNSETS[0]} 1 2 3 4 {SYNSETS[2]} 1 2 3 4"]
    table.write_text("\n".join(["ImageId,PredictionString", *rows, "n15075141_2,17"]))
    assert ImageNet(flat, class_rule=f"csv:{table}").labels("test").tolist() == [10, 0, 17]


def test_the_data_hash_changes_with_class_rule_and_size(flat: Path) -> None:
    hashes = [ImageNet(flat).fingerprint("test"), ImageNet(flat, class_rule="every:7").fingerprint("test")]
    hashes += [ImageNet(flat, shorter=300).fingerprint("test"), ImageNet(flat, image_size=192).fingerprint("test")]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("alphabet", "class_rule is 'alphabet'; it must be synset, every:<k>, csv:<file> or devkit:<folder>"),
        ("every:500", "class_rule is 'every:500'"),
        ("every:x", "class_rule is 'every:x'"),
        ("csv:none.csv", "class_rule is 'csv:none.csv'; there is no such file"),
    ],
)
def test_an_unknown_class_rule_raises_an_error_that_names_it(flat: Path, rule: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImageNet(flat, class_rule=rule).labels("test")


def test_an_image_without_class_raises_an_error_that_names_it(flat: Path) -> None:
    write_image(flat / "val" / "holiday.png", 9)
    with pytest.raises(ValueError, match=r"holiday.png has no synset"):
        ImageNet(flat).labels("test")
    table = flat / "labels.csv"
    table.write_text("name,class\nn01440764_0,1000\nn01530575_1,2\nn15075141_2,3\nholiday,4\n")
    with pytest.raises(ValueError, match=r"labels.csv, line 2: '1000' must be one of the 1000 synsets"):
        ImageNet(flat, class_rule=f"csv:{table}").labels("test")
    table.write_text("name,class\nn01440764_0,1\nn01530575_1,2\n")
    with pytest.raises(ValueError, match=r"holiday.png has no row in .*labels.csv \(2 such images\)"):
        ImageNet(flat, class_rule=f"csv:{table}").labels("test")


def test_errors_name_the_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter is 100; it must be at least image_size, 224"):
        ImageNet(tmp_path, shorter=100)
    with pytest.raises(ValueError, match="holds neither images nor folders of images"):
        ImageNet(tmp_path).labels("test")
    with pytest.raises(FileNotFoundError, match=r"Data folder .*missing does not exist"):
        ImageNet(tmp_path / "missing").labels("test")


@pytest.mark.data
def test_the_real_photographs_have_every_tenth_class(data_root: Path) -> None:
    data = ImageNet(data_root / "imagenet")
    assert data.labels("test").tolist() == list(range(0, 1000, 10))
    assert torch.equal(ImageNet(data_root / "imagenet", class_rule="every:10").labels("val"), data.labels("test"))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The official layout: a flat folder of validation images, and the development kit with an order of its own."""
    for number in (1, 2, 4):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    (tmp_path / "kit" / "data").mkdir(parents=True)
    (tmp_path / "kit" / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n1\n2\n")
    return tmp_path


def write_meta(path: Path, wnids: list[str]) -> None:
    """A `meta.mat` with one inner node behind the classes."""
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    rows = [(number, wnid, 0) for number, wnid in enumerate(wnids, start=1)] + [(len(wnids) + 1, "n00001740", 2)]
    savemat(path, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})


def test_the_development_kit_labels_the_official_flat_folder(official: Path) -> None:
    rule = f"devkit:{official / 'kit'}"
    write_meta(official / "kit" / "data" / "meta.mat", [SYNSETS[1], SYNSETS[2], SYNSETS[0]])
    assert ImageNet(official, class_rule=rule).labels("test").tolist() == [0, 10, 999]
    (official / "kit" / "synsets.txt").write_text("\n".join([SYNSETS[0], SYNSETS[1], f"{SYNSETS[2]} toilet tissue"]))
    assert ImageNet(official, class_rule=rule).labels("test").tolist() == [999, 0, 10]


def test_errors_of_the_development_kit_name_what_is_missing(official: Path) -> None:
    rule = f"devkit:{official / 'kit'}"
    with pytest.raises(FileNotFoundError, match=r"kit has neither meta\.mat nor data/meta\.mat"):
        ImageNet(official, class_rule=rule).labels("test")
    (official / "kit" / "data" / "meta.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match=r"meta\.mat is not the table of synsets"):
        ImageNet(official, class_rule=rule).labels("test")
    (official / "kit" / "synsets.txt").write_text("\n".join(SYNSETS[:2]))
    with pytest.raises(ValueError, match=r"ground_truth\.txt, line 1: class 3 must be from 1 to 2"):
        ImageNet(official, class_rule=rule).labels("test")
    write_image(official / "val" / "ILSVRC2012_val_00000009.JPEG", 9)
    (official / "kit" / "synsets.txt").write_text("\n".join(SYNSETS))
    with pytest.raises(ValueError, match=r"val_00000009\.JPEG must be named ILSVRC2012_val_<n>, with n from 1 to 4"):
        ImageNet(official, class_rule=rule).labels("test")
    with pytest.raises(FileNotFoundError, match="files of ILSVRC2012_devkit_t12"):
        ImageNet(official, class_rule=f"devkit:{official / 'val'}").labels("test")


def test_a_class_of_thousands_of_digits_is_named(flat: Path) -> None:
    table = flat / "labels.csv"
    table.write_text(f"name,class\nn01440764_0,{'9' * 5000}\nn01530575_1,2\nn15075141_2,3\n")
    with pytest.raises(ValueError, match=r"labels.csv, line 2: '9{100}' must be one of the 1000 synsets"):
        ImageNet(flat, class_rule=f"csv:{table}").labels("test")


def test_a_class_of_the_development_kit_of_thousands_of_digits_is_named(official: Path) -> None:
    (official / "kit" / "synsets.txt").write_text("\n".join(SYNSETS))
    for truth in (official / "kit").rglob("*ground_truth.txt"):
        truth.write_text("\n".join(["9" * 5000, *truth.read_text().splitlines()[1:]]))
    with pytest.raises(ValueError, match=r"ground_truth\.txt, line 1: class 9{100} must be from 1 to 3"):
        ImageNet(official, class_rule=f"devkit:{official / 'kit'}").labels("test")
