"""`explain` prepares a picture as the data module prepared those that the network was trained on."""

import cv2
import pytest
import torch
from fuzzing import (
    PICTURES,
    YEARS,
    picture,
    write_cub,
    write_folder,
    write_idrid,
    write_imagenet,
    write_sun,
    write_years,
)
from small_voc import write_voc

from datamodules import CUB, VOC, Columns, IDRiD, ImageFolder, ImageNet, Magnetogram, SyntheticFundus, TarShards
from datamodules.io.tar_files import write_shards
from labn.io.preprocessing import Preprocessing


def write_wide_cub(root):
    """Birds in pictures that are not square, which squashing would distort."""
    write_cub(root)
    for path in (root / "images").glob("*/*.png"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (60, 40)))


def write_captioned_sun(root):
    write_sun(root)
    for year in (2015, 2016, 2017):
        picture(root / f"sun_{year}.png", year, side=40)


def statistics(channels=3):
    return {"mean": [0.4] * channels, "std": [0.2] * channels}


GREY = {"image_size": 8, **YEARS, **statistics(1), "caption": 0.25}
MAKE = {
    "cub": (write_wide_cub, lambda root: CUB(root, image_size=32, resize=36, val_fraction=0.4)),
    "folder": (
        write_folder,
        lambda root: ImageFolder(
            root, image_size=9, crop=(0.1, 0.2, 0.9, 1.0), test_fraction=0.3, val_fraction=0.3, **statistics()
        ),
    ),
    "grey folder": (
        write_folder,
        lambda root: ImageFolder(root, image_size=9, channels=1, test_fraction=0.3, val_fraction=0.3, **statistics(1)),
    ),
    "idrid": (write_idrid, lambda root: IDRiD(root, image_size=8)),
    "imagenet": (write_imagenet, lambda root: ImageNet(root, f"csv:{root}/labels.csv", image_size=8, shorter=9)),
    "sun": (write_captioned_sun, lambda root: Magnetogram(root, fits_range=(0.0, 70.0), **PICTURES, **GREY)),
    "voc": (lambda root: write_voc(root / "voc"), lambda root: VOC(root / "voc", image_size=24)),
}


def prepared(data, path):
    """A picture as `explain` gives it to the network of a checkpoint trained on `data`."""
    kept = Preprocessing(**data.preprocessing().plain())
    return kept.normalise(kept.read(path))


@pytest.mark.parametrize("name", list(MAKE))
def test_pictures_of_the_test_split(name, tmp_path):
    write, make = MAKE[name]
    write(tmp_path)
    data = make(tmp_path)
    for number, record in enumerate(data.source("test").records):
        sample = data.dataset("test")[number]["image"]
        torch.testing.assert_close(prepared(data, record.path), sample, atol=1e-5, rtol=0)


def test_the_sun_has_both_kinds_of_files_and_captions(tmp_path):
    write_captioned_sun(tmp_path)
    data = MAKE["sun"][1](tmp_path)
    kinds = {record.path.suffix for record in data.source("test").records}
    assert kinds == {".png", ".fits"}
    assert not data.source("test").load(1)[0][6:].any()


@pytest.mark.parametrize("kind", ["painted", "years", "tar", "tar of frames"])
def test_samples_that_are_no_picture_files_once_they_are_written_as_such(kind, tmp_path):
    if kind == "painted":
        data = SyntheticFundus(n_train=2, n_val=2, n_test=2, image_size=48)
    elif kind == "years":
        write_years(tmp_path)
        data = Magnetogram(tmp_path, **GREY)
    else:
        write, make = MAKE["cub" if kind == "tar" else "sun"]
        write(tmp_path)
        written = make(tmp_path)
        write_shards(written, tmp_path / "tar")
        data = TarShards(tmp_path / "tar")
        assert data.preprocessing() == written.preprocessing()
    path = tmp_path / "sample.png"
    for number in range(2 if kind != "tar" else 1):
        pixels, _ = data.source("test").load(number)
        assert cv2.imwrite(str(path), pixels[..., ::-1])
        torch.testing.assert_close(prepared(data, path), data.dataset("test")[number]["image"], atol=1e-5, rtol=0)


@pytest.mark.data
def test_a_real_bird_and_a_real_frame(data_root, tmp_path):
    birds = CUB(data_root / "cub10", cache_dir=tmp_path)
    sun = Magnetogram(
        data_root / "sun_aia211",
        labels="labels.csv",
        pictures="img",
        columns=Columns("filename", "flag_OCMX"),
        caption=0.042,
        image_size=128,
        train_years=[2010, 2011, 2012, 2013, 2016],
        val_years=[2014],
        test_years=[2015],
        cache_dir=tmp_path,
    )
    for data in (birds, sun):
        path, sample = data.source("test").records[0].path, data.dataset("test")[0]["image"]
        torch.testing.assert_close(prepared(data, path), sample, atol=1e-5, rtol=0)
