from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_data import write_image

from datamodules import CUB
from datamodules.cub import BoxRecord, BoxSource, read_birds
from labn.io.images import BadImageError, read_image
from labn.metrics.functional import boxes_to_masks

NAMES = {1: "001.Heron", 2: "002.Stork", 7: "007.Ibis"}
SPECIES = [1, 1, 1, 1, 2, 2, 2, 2, 7, 7, 7, 7]
TRAINING = [1, 1, 1, 0] * 3
BOXES, SPLIT, LABELS = "bounding_boxes.txt", "train_test_split.txt", "image_class_labels.txt"
BOX = "10.0 5.5 30.0 20.0"


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Three classes of three training and one test image, 60 x 40 pixels; image 2 is grey."""
    paths = [f"{NAMES[s]}/bird_{n}.jpg" for n, s in enumerate(SPECIES, start=1)]
    for n, path in enumerate(paths, start=1):
        write_image(tmp_path / "images" / path, n, (40, 60) if n == 2 else (40, 60, 3))
    lists = {
        "classes.txt": [f"{number} {name}" for number, name in {**NAMES, 9: "009.Rare"}.items()],
        "images.txt": [f"{n} {path}" for n, path in enumerate(paths, start=1)],
        "image_class_labels.txt": [f"{n} {s}" for n, s in enumerate(SPECIES, start=1)],
        "train_test_split.txt": [f"{n} {t}" for n, t in enumerate(TRAINING, start=1)],
        "bounding_boxes.txt": [f"{n} {BOX}" for n in range(1, 13)],
    }
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def small(root: Path, **options: object) -> CUB:
    options = {"image_size": 32, "resize": 36, "val_fraction": 2 / 9, "batch_size": 4, **options}
    return CUB(root=root, cache_dir=root / "cache", **options)  # type: ignore[arg-type]


def test_the_official_split_is_used_and_validation_is_held_out(birds: Path) -> None:
    data = small(birds)
    data.setup()
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [7, 2, 3]
    assert data.labels("test").tolist() == [0, 1, 2]
    assert data.class_names == list(NAMES.values())
    assert (data.num_classes, data.positive_classes) == (3, (0, 1, 2))
    assert data.sample_name("test", 2) == "007.Ibis/bird_12.jpg"
    names = [{data.sample_name(s, i) for i in range(len(data.labels(s)))} for s in ("train", "val")]  # type: ignore[arg-type]
    assert not names[0] & names[1]
    other = small(birds, split_seed=1)
    assert {other.sample_name("val", i) for i in range(2)} != names[1]


def test_the_default_holds_out_200_of_the_5994_official_training_images() -> None:
    assert round(CUB(root="/absent").val_fraction * 5994) == 200


@pytest.mark.parametrize(("classes", "labels"), [([7, 1], [1, 0]), ([2, 7], [0, 1]), ([1, 2, 7], [0, 1, 2])])
def test_a_subset_of_classes_is_used_in_the_given_order(birds: Path, classes: list[int], labels: list[int]) -> None:
    data = small(birds, classes=classes)
    assert data.class_names == [NAMES[number] for number in classes]
    assert data.labels("test").tolist() == labels


@pytest.mark.parametrize("cached", [False, True])
def test_batches_have_the_bird_box_as_mask_and_as_box(birds: Path, cached: bool) -> None:
    data = small(birds, cache_images=cached)
    data.setup()
    for loader in (data.train_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        count = len(batch["label"])
        assert batch["image"].shape == (count, 3, 32, 32)
        assert batch["mask"].shape == (count, 32, 32)
        assert batch["boxes"].shape == (count, 1, 4)
        assert torch.equal(boxes_to_masks(batch["boxes"], (32, 32)), batch["mask"])
    # 60 x 40 becomes 54 x 36, the middle starts at (11, 2), the box spans x from 9 to 36 and y from 4.95 to 22.95.
    assert batch["boxes"][0].tolist() == [[0, 3, 25, 21]]
    assert data.has_masks("test")


def test_training_crops_reach_pixels_outside_the_central_square(birds: Path) -> None:
    """The sides are white, the middle is black: only a crop of the whole picture can be white all over."""
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, :35] = picture[:, 85:] = 230
    for path in (birds / "images").glob("*/*.jpg"):
        assert cv2.imwrite(str(path), picture + np.uint8(int(path.stem[5:])))
    data = small(birds)
    middle = next(iter(data.test_dataloader()))["image"]
    assert float(middle.max()) < 0
    crops = data.dataset("train", augment=True)
    images = torch.stack([crops[i, epoch]["image"] for i in range(7) for epoch in range(9)])
    assert (images.flatten(1).amin(1) > 0).any()


def test_grey_pictures_have_three_equal_channels(birds: Path) -> None:
    assert cv2.imread(str(birds / "images/001.Heron/bird_2.jpg"), cv2.IMREAD_UNCHANGED).ndim == 2
    source = BoxSource([BoxRecord("x", 0, birds / "images/001.Heron/bird_2.jpg", box=(0, 0, 9, 9))], 36)
    image, _ = source.load(0)
    assert image.shape == (36, 54, 3)
    assert (image == image[..., :1]).all()


def test_fingerprint_changes_with_classes_sizes_and_image_contents(birds: Path) -> None:
    assert small(birds).bias_image().shape == (3, 32, 32)
    prints = {
        small(birds, **o).fingerprint("test") for o in ({}, {"resize": 40}, {"classes": [1, 2]}, {"image_size": 30})
    }
    assert len(prints) == 4
    bird = birds / "images/001.Heron/bird_4.jpg"
    before = bird.read_bytes()
    bird.write_bytes(before[:-40] + bytes([before[-40] ^ 1]) + before[-39:])  # of the same size
    assert small(birds).fingerprint("test") not in prints
    bird.write_bytes(before)
    assert small(birds).fingerprint("test") in prints
    (birds / "bounding_boxes.txt").write_text((birds / "bounding_boxes.txt").read_text().replace("30.0", "31.0"))
    assert small(birds).fingerprint("test") not in prints


def edit(path: Path, line: int, text: str | None) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        (BOXES, 5, None, r"images\.txt, line 5: image 5 \(002.Stork/bird_5.jpg\) has no line in .*bounding_boxes\.txt"),
        (SPLIT, 2, None, r"images\.txt, line 2: image 2 .* has no line in .*train_test_split\.txt"),
        ("images.txt", 12, None, r"image_class_labels\.txt, line 12: image 12 is not listed in .*images\.txt"),
        (LABELS, 3, "3 8", r"image_class_labels\.txt, line 3: class 8 is not listed in .*classes\.txt"),
        (LABELS, 3, "3 2", r"images\.txt, line 3: 001\.Heron/bird_3\.jpg is not in the folder of class 2"),
        (LABELS, 4, "3 1", r"image_class_labels\.txt, line 4: number 3 is already in line 3"),
        (SPLIT, 6, "6 2", r"train_test_split\.txt, line 6: '6 2' must be an image number and 0 \(test\)"),
        (BOXES, 7, "7 1.0 2.0 3.0", r"bounding_boxes\.txt, line 7: .* must be an image number and x, y,"),
        (BOXES, 7, "7 1.0 2.0 0.0 3.0", r"bounding_boxes\.txt, line 7: .* in pixels with an area"),
        ("images.txt", 1, "one x.jpg", r"images\.txt, line 1: 'one x\.jpg' must be an image number and a path"),
    ],
)  # fmt: skip
def test_lists_that_disagree_raise_an_error_with_file_and_line(
    birds: Path, file: str, line: int, text: str | None, message: str
) -> None:
    edit(birds / file, line, text)
    with pytest.raises(ValueError, match=message):
        small(birds).setup("test")


def test_a_missing_list_and_a_missing_or_damaged_image_raise(birds: Path) -> None:
    (birds / "images/001.Heron/bird_4.jpg").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"bird_4\.jpg is not an image: replace it, or set on_bad_image: skip"):
        small(birds).setup("test")
    skipping = small(birds, on_bad_image="skip")
    assert len(skipping.labels("test")) == 2
    (birds / "images/001.Heron/bird_4.jpg").unlink()
    with pytest.raises(BadImageError, match=r"bird_4\.jpg cannot be read \(No such file"):
        small(birds).setup("test")
    (birds / "bounding_boxes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"bounding_boxes\.txt does not exist; `root` must hold CUB-200-2011"):
        small(birds).setup("test")


def test_a_box_outside_its_image_raises_an_error_with_file_and_line(birds: Path) -> None:
    edit(birds / "bounding_boxes.txt", 4, "4 70.0 5.0 10.0 10.0")
    with pytest.raises(
        ValueError, match=r"bounding_boxes\.txt, line 4: box .* lies outside .*bird_4\.jpg, which has 60 x 40"
    ):
        next(iter(small(birds).test_dataloader()))


def test_arguments(birds: Path) -> None:
    with pytest.raises(ValueError, match="resize is 200; it must be at least image_size, 224"):
        CUB(resize=200)
    with pytest.raises(ValueError, match=r"classes is \[1, 1\]; give each class once"):
        CUB(classes=[1, 1])
    with pytest.raises(ValueError, match=r"classes has 9, of which .* lists no image"):
        _ = small(birds, classes=[1, 9]).num_classes
    with pytest.raises(ValueError, match="at least 2 are needed"):
        _ = small(birds, classes=[1]).num_classes


@pytest.mark.data
def test_the_real_birds_have_the_published_counts_and_boxes(data_root: Path) -> None:
    data = CUB(root=data_root / "cub10", val_fraction=0.1)
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [270, 30, 243]
    assert data.num_classes == 10
    birds = read_birds(data_root / "cub10")
    grey = [b for b in birds if cv2.imread(str(data_root / "cub10/images" / b.path), cv2.IMREAD_UNCHANGED).ndim == 2]
    assert len(grey) == 1
    assert read_image(data_root / "cub10/images" / grey[0].path).shape[2] == 3
    sample = data.dataset("test")[3]
    assert sample["mask"].any()
    assert sample["image"].shape == (3, 224, 224)


def test_val_count_sets_the_number_of_validation_images(birds: Path) -> None:
    data = small(birds, val_count=3)
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [6, 3, 3]
    assert small(birds, val_count=2).source("val").names == small(birds, val_fraction=2 / 9).source("val").names
    with pytest.raises(ValueError, match="val_count is 9; it must be from 1 to 8, of 9 images"):
        small(birds, val_count=9).labels("val")


def test_val_count_of_200_gives_the_split_of_the_slides() -> None:
    data = CUB(root="/absent", val_count=200)
    for images in (5994, 5993, 300):
        assert round(data._validation_share(images) * images) == 200
