import csv
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from datamodules import Columns, Magnetogram
from datamodules.magnetogram import day_numbers, find_date
from labn.io.fits import image_header, read_fits
from labn.io.images import BadImageError

SPLITS = {"train_years": [2011, 2012], "val_years": [2013], "test_years": [2014]}
SUN = Columns("filename", "flag_OCMX")


def write_table(path: Path, rows: list[tuple[object, ...]], header: str = "image,flag,year") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture
def years(tmp_path: Path) -> Path:
    """Four years of 8 frames, two per day, flags 0 1 2 3 0 1 2 3; frame i of year y is filled with 10 i + y - 2011."""
    for year in range(2011, 2015):
        frames = np.arange(8, dtype=np.uint8)[:, None, None] * 10 + np.full((8, 32, 32), year - 2011, np.uint8)
        np.save(tmp_path / f"{year}.npy", frames)
        rows = [(f"m_720s.{year}0{1 + i // 2}1{i // 2}_0{i}0000_TAI.png", i % 4, year) for i in range(8)]
        write_table(tmp_path / f"{year}.csv", rows)
    return tmp_path


def yearly(root: Path, **options: object) -> Magnetogram:
    options = {"image_size": 32, "augmentation": None, "cache_dir": root / "cache", **SPLITS, **options}
    return Magnetogram(root, **options)  # type: ignore[arg-type]


def test_frames_come_from_the_years_of_their_split(years: Path) -> None:
    data = yearly(years, mean=[0.0], std=[1.0])
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [16, 8, 8]
    assert data.labels("val").tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert yearly(years, task="classes").labels("val").tolist() == [0, 1, 2, 3] * 2
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (8, 1, 32, 32)
    assert torch.equal((batch["image"] * 255).round()[:, 0, 5, 7].long(), torch.arange(8) * 10 + 3)
    assert data.sample_name("test", 0) == "2014/m_720s.20140110_000000_TAI.png"
    groups = data.groups("test")
    assert groups is not None
    assert torch.equal(groups, batch["group"])
    assert len(groups.unique()) == 4
    assert groups[0] == groups[1] != groups[2]


def test_tasks_have_their_classes_and_positive_classes() -> None:
    binary, classes = Magnetogram("/absent"), Magnetogram("/absent", task="classes")
    assert (binary.num_classes, binary.positive_classes) == (2, (1,))
    assert (classes.num_classes, classes.positive_classes) == (4, (2, 3))


def test_statistics_are_the_arguments_or_are_computed(years: Path) -> None:
    data = yearly(years, mean=None, std=None)
    frames = np.concatenate([np.load(years / f"{year}.npy") for year in (2011, 2012)]) / 255
    assert data.mean == pytest.approx([frames.mean()], abs=1e-12)
    assert data.std == pytest.approx([frames.std()], abs=1e-12)
    assert yearly(years).mean == [0.3625]
    torch.testing.assert_close(data.bias_image()[0], torch.from_numpy(frames.mean(0)).float())


def test_the_caption_is_painted_black_and_changes_the_data_hash(years: Path) -> None:
    masked, plain = yearly(years, caption=0.25, image_size=16), yearly(years, image_size=16)
    image = masked.source("test").load(5)[0][..., 0]
    assert (image[12:] == 0).all()
    assert (image[:12] == 53).all()
    assert (plain.source("test").load(5)[0] == 53).all()
    assert masked.fingerprint("test") != plain.fingerprint("test")


def test_other_frames_in_a_file_of_the_same_size_change_the_data_hash(years: Path) -> None:
    before = {split: yearly(years).fingerprint(split) for split in ("train", "val", "test")}
    frames = np.load(years / "2014.npy")
    frames[3, 16, 16] += 1
    np.save(years / "2014.npy", frames)
    after = {split: yearly(years).fingerprint(split) for split in ("train", "val", "test")}
    assert {split for split in before if before[split] != after[split]} == {"test"}


def test_a_pickled_source_holds_no_frames(years: Path) -> None:
    source = yearly(years).source("train")
    assert len(pickle.dumps(source)) < 4000
    assert np.array_equal(pickle.loads(pickle.dumps(source)).load(9)[0], source.load(9)[0])


def test_frames_without_dates_are_grouped_by_their_number(years: Path) -> None:
    write_table(years / "2013.csv", [(i, i % 4, 2013) for i in range(8)])
    data = yearly(years, frames_per_day=4)
    groups = data.groups("val")
    assert groups is not None
    assert groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "no dates in 2013: 4 consecutive frames count as a day" in data.report()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20101221_034502_512_0211.jpg", "2010-12-21"),
        ("hmi.m_720s.20140501120000_TAI.png", "2014-05-01"),
        ("2014.05.01_12:00", "2014-05-01"),
        ("2014-05-01T12:00:00", "2014-05-01"),
        ("20141399.png", None),
        ("123456.png", None),
    ],
)
def test_dates_are_found_in_names(text: str, expected: str | None) -> None:
    found = find_date(text)
    assert (found and found.isoformat()) == expected


def test_days_are_ordinal_numbers() -> None:
    days = [find_date("20140501"), find_date("20140501"), find_date("20140502")]
    assert np.diff(day_numbers(days, 24)).tolist() == [0, 1]


def break_dtype(root: Path) -> None:
    np.save(root / "2012.npy", np.zeros((8, 32, 32), np.float32))


def break_shape(root: Path) -> None:
    np.save(root / "2012.npy", np.zeros((8, 32), np.uint8))


def break_length(root: Path) -> None:
    np.save(root / "2012.npy", np.zeros((7, 32, 32), np.uint8))


def cut_off(root: Path) -> None:
    content = (root / "2012.npy").read_bytes()
    (root / "2012.npy").write_bytes(content[: len(content) // 2])


def replace(old: str, new: str) -> object:
    def change(root: Path) -> None:
        text = (root / "2012.csv").read_text()
        assert old in text
        (root / "2012.csv").write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("breaking", "error", "message"),
    [
        (lambda r: (r / "2012.npy").unlink(), FileNotFoundError, r"2012\.npy does not exist; every year"),
        (lambda r: (r / "2012.csv").unlink(), FileNotFoundError, r"Label file .*2012\.csv does not exist"),
        (break_length, ValueError, r"2012\.npy has 7 frames but .*2012\.csv has 8 rows"),
        (break_dtype, ValueError, r"2012\.npy holds float32 of shape \(8, 32, 32\); it must be uint8"),
        (break_shape, ValueError, r"2012\.npy holds uint8 of shape \(8, 32\); it must be"),
        (cut_off, ValueError, r"2012\.npy is not a whole \.npy array"),
        (replace("_TAI.png,3", "_TAI.png,4"), ValueError, r"2012\.csv, line 5: flag '4' of .* must be 0 \(none\), 1"),
        (replace("_TAI.png,3", "_TAI.png,M1.2"), ValueError, r"line 5: flag 'M1\.2'"),
        (replace("0110_010000", "0110_000000"), ValueError, r"2012\.csv, line 3: .* already has a row \(.* line 2\)"),
        (replace("image,flag", "image,class"), ValueError, r"2012\.csv has no column 'flag' \(columns\.flag\)"),
    ],
)
def test_errors_name_the_problem_of_a_year(years: Path, breaking, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    breaking(years)
    with pytest.raises(error, match=message):
        yearly(years).setup("fit")


def test_a_split_without_positive_frames_raises_an_error_that_names_it(years: Path) -> None:
    write_table(years / "2013.csv", [(f"20130101_{i}.png", i % 2, 2013) for i in range(8)])
    with pytest.raises(ValueError, match=r": split val has no frame of class M or above among 8 \(years 2013\)"):
        yearly(years).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_years": [2012]}, "Year 2012 is in train_years and in val_years"),
        ({"test_years": []}, "test_years is empty"),
        ({"task": "flares"}, "task is 'flares'"),
        ({"caption": 1.0}, "caption is 1.0"),
        ({"fits_range": (5.0, 5.0)}, "fits_range is"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_them(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Magnetogram("/absent", **{**SPLITS, **options})  # type: ignore[arg-type]


def write_fits(path: Path, image: np.ndarray, **cards: object) -> None:
    """A FITS file written card by card."""
    header = {"SIMPLE": True, "BITPIX": 16, "NAXIS": 2, "NAXIS1": image.shape[1], "NAXIS2": image.shape[0], **cards}
    texts = {True: "T", False: "F"}
    lines = [
        f"{name:<8}= {value!r:<20}"
        if isinstance(value, str)
        else f"{name:<8}= {texts.get(value, value) if isinstance(value, bool) else value:>20} / note"
        for name, value in header.items()
        if value is not None
    ]
    text = "".join(f"{line:<80}" for line in [*lines, "END"])
    data = image.astype(">i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        text.ljust(-(-len(text) // 2880) * 2880).encode() + data.ljust(-(-len(data) // 2880) * 2880, b"\0")
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A PNG, JPEG and FITS file per year from 2011 to 2014; the FITS file is positive, with its date in the header."""
    rows: list[tuple[object, ...]] = []
    for year in range(2011, 2015):
        for kind, flag in (("png", 0), ("jpg", 1), ("fits", 2)):
            name = f"{year}0201_000000.{kind}" if kind != "fits" else f"frame{year - 2010}.fits"
            rows.append((name, flag))
            path = tmp_path / "img" / name
            path.parent.mkdir(exist_ok=True)
            if kind == "fits":
                image = np.array([[0, 10], [20, -32768]])
                write_fits(path, image, BLANK=-32768, BZERO=-10.0, BSCALE=1.0, **{"DATE-OBS": f"{year}-02-01T10:00:00"})
            else:
                cv2.imwrite(str(path), np.full((8, 8, 3), 90, np.uint8))
    write_table(tmp_path / "labels.csv", rows, "filename,flag_OCMX")
    return tmp_path


def by_pictures(root: Path, **options: object) -> Magnetogram:
    given = {"labels": "labels.csv", "pictures": "img", "columns": SUN, "fits_range": (-10.0, 10.0)}
    return yearly(root, **{**given, "image_size": 8, **options})


def test_pictures_of_all_formats_are_read(pictures: Path) -> None:
    data = by_pictures(pictures)
    data.setup("fit")
    assert [len(data.labels(s)) for s in ("train", "val", "test")] == [6, 3, 3]
    assert data.labels("test").tolist() == [0, 0, 1]
    groups = data.groups("test")
    assert groups is not None
    assert len(groups.unique()) == 1
    assert (data.source("test").load(0)[0] == 90).all()


def test_fits_images_are_scaled_and_flipped_with_undefined_pixels_black(pictures: Path) -> None:
    image = by_pictures(pictures, image_size=2).source("test").load(2)[0][..., 0]
    # stored 20 -> 10 -> white, BLANK -> black; below them 0 -> -10 -> black and 10 -> 0 -> middle
    assert image.tolist() == [[255, 0], [0, 128]]


def test_a_time_column_overrides_dates_in_names_and_headers(pictures: Path) -> None:
    rows = list(csv.reader((pictures / "labels.csv").open()))[1:]
    write_table(
        pictures / "labels.csv", [(*row, f"{2014 - i // 3}.05.01_12:00") for i, row in enumerate(rows)], "a,b,t"
    )
    data = by_pictures(pictures, columns=Columns("a", "b", "t"))
    assert data.source("test").names[0] == "20110201_000000.png"


def test_errors_name_the_problem_of_a_picture(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"labels\.csv has no picture of 2009, which val_years names"):
        by_pictures(pictures, val_years=[2009]).setup("fit")
    with pytest.raises(ValueError, match=r"labels\.csv has no column 'when' \(columns\.time\)"):
        by_pictures(pictures, columns=Columns("filename", "flag_OCMX", "when")).setup("fit")
    with pytest.raises(ValueError, match=r"frame1\.fits has no FITS keyword T_REC"):
        by_pictures(pictures, fits_time="T_REC").setup("fit")
    fits = pictures / "img" / "frame2.fits"
    whole = fits.read_bytes()
    fits.write_bytes(whole[:2881])
    with pytest.raises(BadImageError, match=r"frame2\.fits is truncated"):
        by_pictures(pictures).setup("fit")
    write_fits(fits, np.zeros((2, 2)), NAXIS2=None)
    with pytest.raises(ValueError, match=r"frame2\.fits has no FITS keyword NAXIS2"):
        by_pictures(pictures).setup("fit")
    write_fits(fits, np.zeros((2, 2)), NAXIS=0)
    with pytest.raises(BadImageError, match=r"frame2\.fits has no two-dimensional image, neither primary"):
        by_pictures(pictures).setup("fit")
    fits.unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.csv, line 7: .*img has no picture 'frame2\.fits'"):
        by_pictures(pictures).setup("fit")


def test_a_picture_without_a_date_raises_an_error_that_names_it(pictures: Path) -> None:
    (pictures / "img" / "20110201_000000.png").rename(pictures / "img" / "first.png")
    table = pictures / "labels.csv"
    table.write_text(table.read_text().replace("20110201_000000.png", "first.png"))
    with pytest.raises(BadImageError, match=r"first\.png has no date .*columns\.time"):
        by_pictures(pictures).setup("fit")


@pytest.mark.data
def test_memory_maps_and_pictures_give_the_same_real_frames(data_root: Path, tmp_path: Path) -> None:
    """A part of the real pictures as memory maps: images, labels and days agree."""
    options = {"image_size": 64, "caption": 0.042, "mean": [0.3], "std": [0.2]}
    real = yearly(
        data_root / "sun_aia211", labels="labels.csv", pictures="img", columns=SUN, cache_dir=tmp_path, **options
    )
    for split, years in SPLITS.items():
        source = real.source(split.removesuffix("_years"))  # type: ignore[arg-type]
        for year in years:
            chosen = [r for r in source.records if r.name.startswith(str(year))][-20:]  # type: ignore[attr-defined]
            frames = np.stack([cv2.imread(str(record.path), cv2.IMREAD_GRAYSCALE) for record in chosen])
            np.save(tmp_path / f"{year}.npy", frames)
            write_table(tmp_path / f"{year}.csv", [(r.name, 2 * r.label, year) for r in chosen])
    maps = yearly(tmp_path, **options)
    assert [len(maps.labels(s)) for s in ("train", "val", "test")] == [40, 20, 20]
    place = {name: i for i, name in enumerate(real.source("test").names)}
    for sample in maps.dataset("test"):
        other = real.dataset("test")[place[maps.sample_name("test", sample["index"]).split("/")[1]]]
        assert torch.equal(sample["image"], other["image"])
        assert (sample["label"], sample["group"]) == (other["label"], other["group"])


def resident() -> float:
    """Resident set of this process in MiB, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
def test_memory_does_not_grow_while_a_memory_map_is_read(tmp_path: Path) -> None:
    """96 MiB of frames pass through the loader; a map that stayed open would keep them all resident."""
    for year in range(2011, 2015):
        np.lib.format.open_memmap(tmp_path / f"{year}.npy", mode="w+", dtype=np.uint8, shape=(192, 512, 512))
        write_table(tmp_path / f"{year}.csv", [(f"{year}0101_{i}", 2 * (i % 2), year) for i in range(192)])
    data = yearly(tmp_path, batch_size=8)
    seen = []
    for number, batch in enumerate(data.train_dataloader()):
        assert batch["image"].shape == (8, 1, 32, 32)
        if number in (8, 47):
            seen.append(resident())
    assert seen[1] - seen[0] < 24
    held = np.load(tmp_path / "2011.npy", mmap_mode="r")
    before = resident()
    held.sum()
    assert resident() - before > 30


PIXELS = np.array([[0, 10, 20], [30, 40, 50]])  # bottom row first, as FITS stores it


def read(path: Path) -> list[list[int]]:
    return read_fits(path, 0.0, 255.0).tolist()


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ({}, [[30, 40, 50], [0, 10, 20]]),
        ({"CROTA2": 0.05}, [[30, 40, 50], [0, 10, 20]]),
        ({"CROTA2": 180.0}, [[20, 10, 0], [50, 40, 30]]),
        ({"CROTA2": -179.97}, [[20, 10, 0], [50, 40, 30]]),
        ({"CROTA2": 90.0}, [[50, 20], [40, 10], [30, 0]]),
        ({"PC1_1": -1.0, "PC1_2": 0.0, "PC2_1": 0.0, "PC2_2": -1.0}, [[20, 10, 0], [50, 40, 30]]),
    ],
)
def test_fits_images_are_turned_north_up(tmp_path: Path, cards: dict[str, object], expected: list[list[int]]) -> None:
    write_fits(tmp_path / "sun.fits", PIXELS, **cards)
    assert read(tmp_path / "sun.fits") == expected


def test_a_bright_point_moves_as_the_world_coordinates_say(tmp_path: Path) -> None:
    """The world offset of the pixel offset (dx, dy), y up, is (dx cos a - dy sin a, dx sin a + dy cos a)."""
    image, angle = np.zeros((65, 65)), 30.0
    image[32 + 4, 32 + 20] = 250  # dx = 20, dy = 4
    write_fits(tmp_path / "sun.fits", cv2.GaussianBlur(image, (0, 0), 2.0) * 20, CROTA2=angle)
    row, column = np.unravel_index(read_fits(tmp_path / "sun.fits", 0.0, 255.0).argmax(), image.shape)
    a = np.deg2rad(angle)
    assert column - 32 == pytest.approx(20 * np.cos(a) - 4 * np.sin(a), abs=1)
    assert 32 - row == pytest.approx(20 * np.sin(a) + 4 * np.cos(a), abs=1)


def test_a_rotation_that_is_no_number_is_a_bad_image(tmp_path: Path) -> None:
    write_fits(tmp_path / "sun.fits", PIXELS, CROTA2="unknown")
    with pytest.raises(BadImageError, match=r"sun\.fits: FITS keyword CROTA2 is 'unknown'; it must be a finite number"):
        read(tmp_path / "sun.fits")


def test_turned_images_change_the_data_hash(pictures: Path) -> None:
    before = by_pictures(pictures).fingerprint("test")
    path = pictures / "img" / "frame4.fits"
    cards = {"BLANK": -32768, "BZERO": -10.0, "BSCALE": 1.0, "DATE-OBS": "2014-02-01T10:00:00"}
    write_fits(path, np.array([[0, 10], [20, -32768]]), **cards)
    assert by_pictures(pictures).fingerprint("test") == before
    assert "turned" not in by_pictures(pictures).source("test").identity
    write_fits(path, np.array([[0, 10], [20, -32768]]), CROTA2=180.0, **cards)
    data = by_pictures(pictures, image_size=2)
    assert "turned" in data.source("test").identity
    assert data.source("test").load(2)[0][..., 0].tolist() == [[128, 0], [0, 255]]


def compressed_card(name: str, value: object) -> str:
    return f"{name:<8}= {value:>20}".ljust(80)


def write_compressed_header(path: Path) -> None:
    """An empty primary image, and the header and table of a tile-compressed one; the tiles are zeros."""
    primary = {"SIMPLE": "T", "BITPIX": 8, "NAXIS": 0}
    table = {"XTENSION": "'BINTABLE'", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": 2, "PCOUNT": 0, "GCOUNT": 1}
    table |= {"ZIMAGE": "T", "ZBITPIX": 16, "ZNAXIS": 2, "ZNAXIS1": 3, "ZNAXIS2": 2}
    data = b""
    for cards in (primary, table):
        text = "".join(compressed_card(name, value) for name, value in cards.items()) + "END"
        data += text.ljust(2880).encode()
    path.write_bytes(data + bytes(2880))


def test_a_compressed_image_without_astropy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_compressed_header(tmp_path / "sun.fits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadImageError, match=r"sun\.fits is compressed .*; install astropy to read it"):
        read(tmp_path / "sun.fits")


def test_an_uncompressed_image_extension_is_read(tmp_path: Path) -> None:
    write_fits(tmp_path / "image.fits", PIXELS)
    data = (tmp_path / "image.fits").read_bytes()
    empty = "".join(compressed_card(n, v) for n, v in {"SIMPLE": "T", "BITPIX": 8, "NAXIS": 0}.items()) + "END"
    extension = data.replace(data[:80], b"XTENSION= 'IMAGE   '".ljust(80), 1)
    (tmp_path / "sun.fits").write_bytes(empty.ljust(2880).encode() + extension)
    assert read(tmp_path / "sun.fits") == read(tmp_path / "image.fits")


def test_a_compressed_image_is_read_with_astropy(tmp_path: Path) -> None:
    fits = pytest.importorskip("astropy.io.fits")
    pixels = np.arange(100, 1700, dtype=np.int16).reshape(40, 40)
    cards = fits.Header({"CROTA2": 180.0, "DATE-OBS": "2014-02-01T10:00:00", "BSCALE": 0.1, "BZERO": 5.0})
    image = fits.CompImageHDU(pixels, header=cards, compression_type="RICE_1")
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(tmp_path / "sun.fits")
    with fits.open(tmp_path / "sun.fits") as units:
        physical = np.asarray(units[1].data, dtype=np.float64)
    expected = np.rint(np.clip((physical - 10.0) / 90.0, 0, 1) * 255).astype(np.uint8)[:, ::-1]
    np.testing.assert_array_equal(read_fits(tmp_path / "sun.fits", 10.0, 100.0), expected)
    assert image_header(tmp_path / "sun.fits")[0]["DATE-OBS"] == "2014-02-01T10:00:00"
