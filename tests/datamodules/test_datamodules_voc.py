"""Pascal VOC data: boxes in, boxes out, and every flaw named."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import ExifTags, Image
from small_voc import annotation, write_voc, xml

from datamodules import VOC, Augmentation
from datamodules.voc import read_annotation

STILL = {"rotation": 0.0, "crop_scale": None, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "erasing": 0.0}


@pytest.fixture
def root(tmp_path):
    return write_voc(tmp_path / "voc")


def module(root, **settings):
    return VOC(root, **{"image_size": 120, "batch_size": 3, **settings})


def test_boxes_scale_with_the_squashed_image(root):
    with pytest.warns(UserWarning, match=r"e\.xml, object 2 \(cat\) has a box without area"):
        batch = next(iter((data := module(root)).test_dataloader()))
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    assert batch["image"].shape == (1, 3, 120, 120)
    # 60 x 40 becomes 120 x 120; VOC's first pixel is number 1.
    assert batch["boxes"][0].tolist() == [[60.0, 60.0, 120.0, 120.0]]
    assert batch["labels"][0].tolist() == [1]
    assert batch["label"].tolist() == [1]
    assert batch["index"].tolist() == [0]
    assert data.sample_name("test", 0) == "e"
    assert "without area" in data.report()
    assert "train: 3 images (cat 1, dog 2)" in data.report()


def test_images_without_objects_are_kept(root):
    with pytest.warns(UserWarning, match="without area"):
        batch = next(iter(module(root, augmentation=None).train_dataloader()))
    counts = dict(zip(batch["index"].tolist(), map(len, batch["boxes"])))
    assert counts == {0: 2, 1: 1, 2: 0}
    empty = batch["index"].tolist().index(2)
    assert batch["boxes"][empty].shape == (0, 4)
    assert batch["label"][empty] == -1


@pytest.mark.filterwarnings("ignore:.*without area")
def test_a_flip_flips_the_boxes(root):
    flip = Augmentation(horizontal_flip=1.0, vertical_flip=0.0, **STILL)
    plain = module(root).dataset("train")[0]
    flipped = module(root, augmentation=flip).dataset("train", augment=True)[0]
    torch.testing.assert_close(flipped["image"], plain["image"].flip(-1))
    x1, y1, x2, y2 = plain["boxes"].unbind(1)
    torch.testing.assert_close(flipped["boxes"], torch.stack([120 - x2, y1, 120 - x1, y2], 1))
    assert flipped["labels"].tolist() == plain["labels"].tolist()


@pytest.mark.filterwarnings("ignore:.*without area")
def test_a_crop_keeps_the_objects_that_are_still_visible(root):
    crop = Augmentation(horizontal_flip=0.0, vertical_flip=0.0, **{**STILL, "crop_scale": (0.2, 0.4)})
    data = module(root, augmentation=crop, min_visibility=0.5)
    dataset = data.dataset("train", augment=True)
    counts = set()
    for epoch in range(12):
        sample = dataset[0, epoch]
        assert len(sample["boxes"]) == len(sample["labels"])
        assert bool((sample["boxes"] >= 0).all())
        assert bool((sample["boxes"] <= 120).all())
        torch.testing.assert_close(sample["boxes"], dataset[0, epoch]["boxes"])
        counts.add(len(sample["boxes"]))
    assert len(counts) > 1


@pytest.mark.filterwarnings("ignore:.*without area")
def test_difficult_objects_are_left_out_of_training_only(root):
    annotation(root, "b").write_text(xml([("dog", (1, 1, 60, 40))], difficult=1))
    data = module(root)
    assert data.dataset("train")[1]["difficult"].tolist() == [True]
    assert len(data.dataset("train", augment=True)[1]["boxes"]) == 0


@pytest.mark.filterwarnings("ignore:.*without area")
def test_cached_images_give_the_same_batches(root):
    plain, cached = module(root), module(root, cache_images=True)
    cached.setup("fit")
    torch.testing.assert_close(cached.dataset("train")[0], plain.dataset("train")[0])
    assert cached.fingerprint("train") == plain.fingerprint("train")
    annotation(root, "a").write_text(xml([("cat", (11, 6, 30, 26))]))
    assert module(root).fingerprint("train") != plain.fingerprint("train")


@pytest.mark.filterwarnings("ignore:.*without area")
def test_two_images_of_one_listed_name_raise_an_error_that_names_them(root):
    shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "unlisted.jpg")
    shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "unlisted.png")
    assert len(module(root).labels("train")) == 3
    shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "a.png")
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png are both image 'a'; keep one of them"):
        module(root).labels("train")


@pytest.mark.filterwarnings("ignore:.*without area")
def test_an_unknown_class_raises_an_error_that_names_it(root):
    with pytest.raises(ValueError, match=r"a\.xml, object 2: class 'dog' is not one of cat; add it to `classes`"):
        module(root, classes=["cat"]).labels("train")


def test_broken_xml_raises_an_error_with_file_and_line(root):
    annotation(root, "b").write_text("<annotation>\n<size>\n</annotation>\n")
    with pytest.raises(ValueError, match=r"b\.xml, line 3, column \d+: broken XML"):
        module(root).labels("train")


@pytest.mark.filterwarnings("ignore:.*without area")
def test_a_box_outside_the_image_raises_or_is_clipped(root):
    annotation(root, "b").write_text(xml([("dog", (51, 1, 70, 40))]))
    with pytest.raises(ValueError, match=r"b\.xml, object 1 \(dog\): its box reaches outside the image of 60 x 40"):
        module(root).labels("train")
    with pytest.warns(UserWarning, match="is clipped"):
        clipped = module(root, on_bad_box="clip").dataset("train")[1]["boxes"]
    assert clipped.tolist() == [[100.0, 0.0, 120.0, 120.0]]
    annotation(root, "b").write_text(xml([("dog", (71, 1, 80, 40))]))
    with pytest.raises(ValueError, match="reaches outside"):
        module(root, on_bad_box="clip").labels("train")


@pytest.mark.filterwarnings("ignore:.*without area")
def test_an_annotation_must_have_the_size_of_its_image(root):
    annotation(root, "b").write_text(xml([("dog", (1, 1, 60, 40))], size=(120, 80)))
    with pytest.raises(ValueError, match=r"b\.xml is of 120 x 80 pixels, but image .*b\.jpg has 60 x 40"):
        module(root).labels("train")
    image = root / "JPEGImages" / "b.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (80, 120)).save(image, exif=exif)
    assert module(root).objects("train")[1].boxes.tolist() == [[0, 0, 0.5, 0.5]]
    image.write_bytes(b"")
    assert "skipped b" in module(root, on_bad_image="skip").report()
    annotation(root, "b").write_text(xml([], size=(60, 0)))
    with pytest.raises(ValueError, match=r"b\.xml: size is 60 x 0; width and height must be at least one pixel"):
        module(root).labels("train")


def test_an_image_listed_twice_raises_an_error_with_both_lines(root):
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n\na\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 4: 'a' is already in line 1; every image needs"):
        module(root).labels("train")


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_in_training_and_test_raises(root, split):
    (root / "ImageSets" / "Main" / "mixed.txt").write_text("d\nb\n")
    with pytest.raises(ValueError, match=rf"train \(train\.txt\) and {split} \(mixed\.txt\) of .* both list 'b' \(1 "):
        module(root, image_sets={split: "mixed"}).labels("train")
    assert module(root, image_sets={"test": "val"}).source("test").names == ["d"]


def test_missing_files_raise_an_error_that_names_them(root):
    path = annotation(root, "b")
    path.write_text(xml([("dog", (1, 1, 9, 9))]).replace("<xmin>1</xmin>", "<xmin>one</xmin>"))
    with pytest.raises(ValueError, match=r"b\.xml, object 1: bndbox/xmin is 'one'; it must be a number of pixels"):
        read_annotation(path)
    path.write_text(xml([("", (1, 1, 9, 9))]))
    with pytest.raises(ValueError, match="object 1 has no name"):
        read_annotation(path)
    with pytest.raises(FileNotFoundError, match=r"zz\.xml does not exist"):
        read_annotation(root / "Annotations" / "zz.xml")
    with pytest.raises(FileNotFoundError, match=r"other\.txt does not exist"):
        module(root, image_sets={"val": "other"}).labels("val")
    with pytest.raises(ValueError, match="image_sets has the split 'dev'"):
        module(root, image_sets={"dev": "val"})
    with pytest.raises(ValueError, match="on_bad_box is 'drop'"):
        module(root, on_bad_box="drop")


@pytest.mark.data
def test_the_real_blood_cells_have_the_published_counts(data_root):
    data = VOC(data_root / "bccd")
    with pytest.warns(UserWarning, match=r"BloodImage_003(38|43)\.xml.*without area"):
        report = data.report()
    assert data.class_names == ["Platelets", "RBC", "WBC"]
    assert [len(data.source(split)) for split in ("train", "val", "test")] == [205, 87, 72]
    assert report.count("without area") == 2
    counts = torch.stack(
        [
            torch.bincount(torch.from_numpy(o.labels), minlength=3)
            for s in ("train", "val", "test")
            for o in data.objects(s)
        ]
    )
    assert counts.sum(0).tolist() == [361, 4155 - 2, 372]


@pytest.mark.filterwarnings("ignore:.*without area")
def test_a_folder_above_the_only_voc_folder_is_accepted(tmp_path):
    write_voc(tmp_path / "data" / "VOCdevkit" / "VOC2012")
    for folder in (tmp_path / "data", tmp_path / "data" / "VOCdevkit"):
        data = module(folder)
        assert data.root == tmp_path / "data" / "VOCdevkit" / "VOC2012"
        assert data.class_names == ["cat", "dog"]


def test_a_folder_above_several_voc_folders_lists_them(tmp_path):
    for year in (2007, 2012):
        write_voc(tmp_path / "VOCdevkit" / f"VOC{year}")
    with pytest.raises(FileNotFoundError, match=r"VOCdevkit holds several folders .*\(VOC2007, VOC2012\); set `root`"):
        module(tmp_path / "VOCdevkit").report()
    with pytest.raises(FileNotFoundError, match="has no folder Annotations and no folder ImageSets/Main and no folder"):
        module(tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages").report()


def test_a_set_without_image_lists_says_what_to_write(root):
    shutil.rmtree(root / "ImageSets")
    with pytest.raises(FileNotFoundError, match=r"no folder ImageSets/Main; put train\.txt, val\.txt and test\.txt"):
        module(root).report()
