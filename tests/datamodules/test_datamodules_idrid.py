from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from small_data import grading_csv, grading_image, write_image

from datamodules import IDRiD
from datamodules.idrid import lesion_masks, segmentation_pairs
from labn.io.images import BadImageError
from labn.io.readers import read_table


def small(root: Path, **options: object) -> IDRiD:
    return IDRiD(root=root, image_size=32, cache_dir=root / "cache", **options)  # type: ignore[arg-type]


def test_label_files_with_empty_columns_and_rows_are_read(small_idrid: Path) -> None:
    data = small(small_idrid)
    data.setup("fit")
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [8, 2, 4]
    assert data.labels("test").tolist() == [0, 1, 0, 1]
    assert small(small_idrid, task="grades").labels("test").tolist() == [0, 4, 0, 2]
    assert data.sample_name("test", 1) == "IDRiD_002"
    assert not data.has_masks("train")
    assert "mask" not in next(iter(data.val_dataloader()))


def test_class_names_are_known_without_any_file() -> None:
    binary, grades = IDRiD(root="/absent"), IDRiD(root="/absent", task="grades")
    assert (binary.num_classes, binary.positive_classes) == (2, (1,))
    assert (grades.num_classes, grades.positive_classes) == (5, (1, 2, 3, 4))
    assert len(grades.class_names) == 5
    with pytest.raises(ValueError, match="task is 'both'; it must be 'binary' or 'grades'"):
        IDRiD(task="both")  # type: ignore[arg-type]


def test_copy_of_a_test_image_leaves_training(small_idrid: Path) -> None:
    copied = grading_image(small_idrid, "test", 3).read_bytes()
    grading_image(small_idrid, "train", 5).write_bytes(copied)
    data = small(small_idrid)
    names = [data.sample_name(s, i) for s in ("train", "val") for i in range(len(data.labels(s)))]  # type: ignore[arg-type]
    assert len(names) == 9
    assert "IDRiD_005" not in names
    assert len(data.labels("test")) == 4
    assert "IDRiD_005 (class 1) is byte-identical to the held-out image IDRiD_003 (class 0)" in data.report()


def test_a_missing_folder_raises_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"Data folder {tmp_path / 'nowhere'} does not exist"):
        small(tmp_path / "nowhere").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"Image folder .* does not exist; `root` must contain 'B\. Disease"):
        small(tmp_path).setup("fit")


def test_a_row_without_image_raises_an_error_that_names_it(small_idrid: Path) -> None:
    grading_image(small_idrid, "train", 4).unlink()
    with pytest.raises(ValueError, match=r"Training Labels\.csv has a row for 'IDRiD_004', but .* no such image"):
        small(small_idrid).setup("fit")


def test_an_image_without_row_raises_an_error_that_names_it(small_idrid: Path) -> None:
    write_image(grading_image(small_idrid, "test", 77), 0)
    with pytest.raises(ValueError, match=r"IDRiD_077\.jpg has no row in .*Testing Labels\.csv"):
        small(small_idrid).setup("test")


def test_two_images_of_one_name_raise_an_error_that_names_them(small_idrid: Path) -> None:
    image = grading_image(small_idrid, "train", 2)
    write_image(image.with_suffix(".png"), 0)
    with pytest.raises(ValueError, match=r"IDRiD_002\.jpg and IDRiD_002\.png are both image 'IDRiD_002'; keep one"):
        small(small_idrid).setup("fit")


@pytest.mark.parametrize("grade", ["5", "-1", "", "2.5", "high"])
def test_a_grade_outside_the_scale_raises_an_error_that_names_it(small_idrid: Path, grade: str) -> None:
    table = grading_csv(small_idrid, "train")
    table.write_text(table.read_text().replace("IDRiD_003,2,", f"IDRiD_003,{grade},"))
    message = rf"csv, line 4: retinopathy grade '{grade}' of image 'IDRiD_003' must be an integer from 0 to 4"
    with pytest.raises(ValueError, match=message):
        small(small_idrid).setup("fit")


def test_errors_name_the_problem_of_a_label_file(small_idrid: Path) -> None:
    table = grading_csv(small_idrid, "train")
    text = table.read_text()
    table.write_text(text + "IDRiD_001,0,0\n")
    with pytest.raises(ValueError, match="image 'IDRiD_001' already has a row"):
        small(small_idrid).setup("fit")
    table.write_text(text.replace("Retinopathy grade", "Grade"))
    with pytest.raises(ValueError, match="has no column 'Retinopathy grade'"):
        small(small_idrid).setup("fit")
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"Label file .* does not exist"):
        small(small_idrid).setup("fit")


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0 and no more"])
def test_bad_image_stops_before_training_or_is_skipped(small_idrid: Path, content: bytes) -> None:
    grading_image(small_idrid, "train", 6).write_bytes(content)
    with pytest.raises(BadImageError, match=r"IDRiD_006\.jpg is .*set on_bad_image: skip"):
        small(small_idrid).setup("fit")
    data = small(small_idrid, on_bad_image="skip")
    data.setup("fit")
    assert len(data.labels("train")) + len(data.labels("val")) == 9
    assert "skipped IDRiD_006" in data.report()
    with pytest.raises(ValueError, match="on_bad_image is 'ignore'; it must be 'stop' or 'skip'"):
        small(small_idrid, on_bad_image="ignore")


def test_damaged_data_of_a_complete_png_raises_before_training(small_idrid: Path) -> None:
    path = grading_image(small_idrid, "train", 6)
    path.write_bytes(b"\xff\xd8\xff" + bytes(300) + b"\xff\xd9")
    with pytest.raises(BadImageError, match=r"IDRiD_006\.jpg is not an image"):
        small(small_idrid).setup("fit")


def test_masks_are_the_union_of_lesions_without_the_optic_disc(small_idrid: Path) -> None:
    folder = small_idrid / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set"
    parts = {"1. Microaneurysms/IDRiD_09_MA": 0, "3. Hard Exudates/IDRiD_09_EX": 1, "5. Optic Disc/IDRiD_09_OD": 2}
    for name, quarter in parts.items():
        mask = np.zeros((80, 120), np.uint8)
        mask[:, 30 * quarter : 30 * (quarter + 1)] = 255
        (folder / name).parent.mkdir(parents=True)
        cv2.imwrite(str(folder / f"{name}.png"), mask)
    header = "segmentation image,segmentation set,grading image,grading set"
    row = "IDRiD_09,a. Training Set,IDRiD_002,b. Testing Set"
    (small_idrid / "segmentation_to_grading.csv").write_text(f"{header}\n{row}\n")
    data = small(small_idrid, crop=None)
    files = lesion_masks(small_idrid).files["b. Testing Set", "IDRiD_002"]
    assert [path.stem for path in files] == ["IDRiD_09_MA", "IDRiD_09_EX"]
    masks = next(iter(data.test_dataloader()))["mask"]
    assert masks.dtype == torch.bool
    assert masks.sum((1, 2)).tolist() == [0, 32 * 16, 0, 0]
    assert masks[1, :, :16].all()
    assert not small(small_idrid, masks=False).has_masks("test")
    cropped = next(iter(small(small_idrid, crop=(0.25, 0.0, 1.0, 1.0)).test_dataloader()))["mask"]
    assert cropped[1].any(0).tolist() == [True] * 11 + [False] * 21


@pytest.mark.data
def test_the_real_data_has_the_published_counts_and_known_duplicates(idrid_root: Path, tmp_path: Path) -> None:
    data = IDRiD(root=idrid_root, task="grades", cache_dir=tmp_path)
    grades = {split: torch.bincount(data.labels(split)) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    assert grades["test"].tolist() == [34, 5, 32, 19, 13]
    assert (grades["train"] + grades["val"]).tolist() == [133, 20, 136, 74, 49]
    assert [int(g.sum()) for g in grades.values()] == [330, 82, 103]
    names = {s: {data.sample_name(s, i) for i in range(len(data.labels(s)))} for s in ("train", "val")}  # type: ignore[arg-type]
    assert not names["train"] & names["val"]
    assert "IDRiD_118" not in names["train"] | names["val"]
    for a, b in ((79, 279), (21, 391), (45, 333), (73, 375), (28, 327)):
        assert (f"IDRiD_{a:03d}" in names["train"]) == (f"IDRiD_{b:03d}" in names["train"])
        assert f"IDRiD_{a:03d}" in data.report()
    binary = IDRiD(root=idrid_root, cache_dir=tmp_path)
    assert int(binary.labels("test").sum()) == 69
    assert int(binary.labels("train").sum() + binary.labels("val").sum()) == 279


@pytest.mark.data
def test_real_lesion_masks_lie_on_lesions(idrid_root: Path, tmp_path: Path) -> None:
    """Hard exudates are the brightest lesions: their pixels must be brighter than their surroundings."""
    data = IDRiD(root=idrid_root, cache_dir=tmp_path)
    source = data.source("test")
    masked = [source.load(i) for i in range(len(source)) if source.records[i].masks]  # type: ignore[attr-defined]
    assert len(masked) == 3
    assert all(label == 1 for label, record in zip(source.labels, source.records) if record.masks)  # type: ignore[attr-defined]
    for image, mask in masked:
        assert mask is not None
        assert 0 < mask.mean() < 0.2
        blurred = cv2.GaussianBlur(image, (0, 0), 10).astype(float)
        contrast = np.abs(image[..., 1] - blurred[..., 1])
        assert contrast[mask].mean() > 1.5 * contrast[image[..., 1] > 20].mean()


def segmentation_copy(root: Path, name: str, source: Path, lesion: str = "3. Hard Exudates") -> None:
    """A larger copy of a picture among the segmentation images, with a palette TIFF as its mask."""
    folder = root / "A. Segmentation"
    pixels = cv2.imread(str(source))
    larger = np.kron(pixels, np.ones((2, 2, 1), np.uint8))
    images = folder / "1. Original Images" / "a. Training Set"
    images.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(images / f"{name}.jpg"), larger, [cv2.IMWRITE_JPEG_QUALITY, 100])
    region = np.zeros(larger.shape[:2], np.uint8)
    region[20:120, 30:150] = 1
    mask = Image.fromarray(region, "P")
    mask.putpalette([0, 0, 0, 255, 0, 0])
    masks = folder / "2. All Segmentation Groundtruths" / "a. Training Set" / lesion
    masks.mkdir(parents=True, exist_ok=True)
    mask.save(masks / f"{name}_EX.tif", compression="tiff_lzw")


def smooth_picture(path: Path, seed: int) -> None:
    """A picture without fine detail, which JPEG and other sizes hardly change."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(coarse, (240, 160)), [cv2.IMWRITE_JPEG_QUALITY, 100])


@pytest.fixture
def smooth_idrid(small_idrid: Path) -> Path:
    for number, path in enumerate(sorted((small_idrid / "B. Disease Grading").rglob("*.jpg"))):
        smooth_picture(path, number)
    return small_idrid


def test_the_official_folder_has_masks_without_a_table(smooth_idrid: Path) -> None:
    segmentation_copy(smooth_idrid, "IDRiD_40", grading_image(smooth_idrid, "test", 2))
    segmentation_copy(smooth_idrid, "IDRiD_41", grading_image(smooth_idrid, "train", 5))
    data = small(smooth_idrid, crop=None)
    masks = next(iter(data.test_dataloader()))["mask"]
    assert masks.any(2).any(1).tolist() == [False, True, False, False]
    files = lesion_masks(smooth_idrid, smooth_idrid / "cache").files
    assert {key: [path.stem for path in paths] for key, paths in files.items()} == {
        ("b. Testing Set", "IDRiD_002"): ["IDRiD_40_EX"],
        ("a. Training Set", "IDRiD_005"): ["IDRiD_41_EX"],
    }
    assert "lesion masks: 2 of 2 segmentation images are photographs of the grading data" in data.report()


def test_missing_and_ambiguous_photographs_are_named(smooth_idrid: Path) -> None:
    other = smooth_idrid / "other.jpg"
    smooth_picture(other, 999)
    segmentation_copy(smooth_idrid, "IDRiD_50", other)
    twice = grading_image(smooth_idrid, "train", 3)
    segmentation_copy(smooth_idrid, "IDRiD_51", twice)
    cv2.imwrite(str(grading_image(smooth_idrid, "test", 4)), cv2.imread(str(twice)), [cv2.IMWRITE_JPEG_QUALITY, 99])
    report = small(smooth_idrid).report()
    assert "not in the grading data, whose masks are not used: a. Training Set/IDRiD_50" in report
    assert "like several of them, whose masks are not used: a. Training Set/IDRiD_51" in report


def test_byte_identical_grading_images_share_their_masks(smooth_idrid: Path) -> None:
    copied = grading_image(smooth_idrid, "train", 3)
    grading_image(smooth_idrid, "test", 4).write_bytes(copied.read_bytes())
    segmentation_copy(smooth_idrid, "IDRiD_51", copied)
    files = lesion_masks(smooth_idrid, smooth_idrid / "cache").files
    assert set(files) == {("a. Training Set", "IDRiD_003"), ("b. Testing Set", "IDRiD_004")}


def test_the_comparison_is_cached_until_a_file_changes(smooth_idrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmentation_copy(smooth_idrid, "IDRiD_40", grading_image(smooth_idrid, "test", 2))
    first = lesion_masks(smooth_idrid, smooth_idrid / "cache")
    monkeypatch.setattr("datamodules.io.photo_matching.match_photographs", None)
    assert lesion_masks(smooth_idrid, smooth_idrid / "cache") == first
    monkeypatch.undo()
    smooth_picture(grading_image(smooth_idrid, "test", 2), 77)
    assert not lesion_masks(smooth_idrid, smooth_idrid / "cache").files


@pytest.mark.data
def test_the_comparison_of_the_real_pictures_gives_the_table(idrid_root: Path, tmp_path: Path) -> None:
    for name in ("A. Segmentation", "B. Disease Grading"):
        (tmp_path / name).symlink_to((idrid_root / name).resolve())
    pairs, notes = segmentation_pairs(tmp_path, tmp_path / "cache")
    table = list(read_table(idrid_root / "segmentation_to_grading.csv"))
    columns = ("segmentation set", "segmentation image", "grading set", "grading image")
    assert [(*first, *second) for first, second in pairs] == [tuple(row[c] for c in columns) for row in table]
    assert "45 of 54 segmentation images" in notes[0]
    missing = notes[1].split(": ")[-1].split(", ")
    assert [name[-2:] for name in missing] == ["04", "11", "12", "25", "26", "30", "32", "39", "45"]
    with_table = lesion_masks(idrid_root).files
    without = lesion_masks(tmp_path, tmp_path / "cache").files
    assert {k: [p.name for p in v] for k, v in without.items()} == {
        k: [p.name for p in v] for k, v in with_table.items()
    }
