import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image
from small_data import write_image

from datamodules.base import data_root
from datamodules.io.image_checks import image_error
from datamodules.io.sources import Record
from datamodules.io.splits import readable_records, split_off, without_copies
from labn.io.images import (
    BLOCK,
    BadImageError,
    content_hash,
    crop,
    identical_groups,
    oriented_size,
    read_image,
    read_mask,
    squash,
    squash_mask,
)


def test_data_root_prefers_the_argument_then_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "idrid").mkdir(parents=True)
    monkeypatch.setenv("LABN_DATA", str(tmp_path / "a"))
    assert data_root("idrid") == tmp_path / "a" / "idrid"
    assert data_root("idrid", tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"Data folder .*cub does not exist: pass `root`, or set LABN_DATA"):
        data_root("cub")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif"])
def test_complete_images_pass_the_check(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    write_image(path, 0)
    assert image_error(path) is None
    assert read_image(path).shape == (40, 60, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(9))
def test_oriented_size_is_the_size_of_the_decoded_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    path, exif = tmp_path / f"image.{suffix}", Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    height, width = read_image(path).shape[:2]
    assert oriented_size(path) == (width, height) == ((40, 60) if orientation > 4 else (60, 40))


def test_damaged_metadata_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (60, 40)).save(path, exif=b"Exif\0\0XX" + bytes(30))
    assert oriented_size(path) == read_image(path).shape[1::-1] == (60, 40)


@pytest.mark.parametrize(("suffix", "reason"), [("jpg", "end-of-image"), ("png", "IEND")])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_images_fail_the_check(tmp_path: Path, suffix: str, reason: str, part: float) -> None:
    path = tmp_path / f"image.{suffix}"
    write_image(path, 0, (200, 200, 3))
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert reason in str(image_error(path))


@pytest.mark.parametrize("suffix", ["bmp", "tif", "webp"])
@pytest.mark.parametrize("part", [0.5, 0.99])
def test_truncated_images_without_an_end_marker_fail_the_check(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"image.{suffix}"
    write_image(path, 0, (200, 200, 3))
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert re.search("cannot be decoded|is not an image", str(image_error(path)))


def test_a_png_with_damaged_data_fails_the_check(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    write_image(path, 0, (200, 200, 3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert image_error(path) == "is damaged (a checksum does not fit)"


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_an_image_with_32_bit_values_fails_the_check(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.arange(1600, dtype=kind).reshape(40, 40)).save(tmp_path / "bad.tif")
    good, notes = readable_records([Record("bad", 0, tmp_path / "bad.tif")], "skip", [tmp_path])
    assert not good
    assert "neither 8 nor 16 bits" in notes[0]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_data_behind_the_end_of_an_image_pass_the_check(tmp_path: Path, suffix: str) -> None:
    """The photos of telephones carry a film there."""
    path = tmp_path / f"image.{suffix}"
    write_image(path, 0)
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert image_error(path) is None
    assert read_image(path).shape == (40, 60, 3)


def test_the_check_reads_only_both_ends_of_a_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "image.jpg", 0)
    monkeypatch.setattr(cv2, "imdecode", None)
    assert image_error(tmp_path / "image.jpg") is None


def test_the_error_of_reading_does_not_mention_on_bad_image(tmp_path: Path) -> None:
    """What the check has let pass `on_bad_image: skip` would not leave out."""
    write_image(tmp_path / "image.bmp", 0)
    (tmp_path / "image.bmp").write_bytes((tmp_path / "image.bmp").read_bytes()[:3000])
    with pytest.raises(BadImageError, match=r"image\.bmp cannot be decoded; replace it or take it out of the data\.$"):
        read_image(tmp_path / "image.bmp")


def test_other_bad_files_fail_the_check(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    assert image_error(tmp_path / "text.jpg") == "is not an image"
    assert image_error(tmp_path / "empty.jpg") == "is not an image"
    assert "cannot be read" in str(image_error(tmp_path / "absent.jpg"))
    for name in ("text.jpg", "empty.jpg"):
        with pytest.raises(BadImageError, match=f"{name} is not an image; replace it"):
            read_image(tmp_path / name)
    with pytest.raises(BadImageError, match=r"absent.jpg cannot be read \(No such file.*\); put it back"):
        read_image(tmp_path / "absent.jpg")


def test_images_are_read_as_rgb_from_every_format(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 4), dtype=np.uint8)
    red[..., 2], red[..., 3] = 200, 128
    cv2.imwrite(str(tmp_path / "rgba.png"), red)
    assert read_image(tmp_path / "rgba.png")[0, 0].tolist() == [200, 0, 0]
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((8, 8), 77, np.uint8))
    assert read_image(tmp_path / "grey.png")[0, 0].tolist() == [77, 77, 77]
    assert read_image(tmp_path / "grey.png", channels=1).shape == (8, 8, 1)
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((8, 8), 51200, np.uint16))
    assert read_image(tmp_path / "deep.png")[0, 0].tolist() == [200, 200, 200]
    assert read_mask(tmp_path / "grey.png").all()


MASK = np.zeros((6, 8), dtype=bool)
MASK[1:3, 2:7] = True
MASK[4, 0] = True


def saved_mask(path: Path, kind: str) -> None:
    colours = np.zeros((6, 8, 3), dtype=np.uint8)
    colours[MASK] = (0, 0, 4)
    palette = Image.fromarray(MASK.astype(np.uint8))
    palette.putpalette([0, 0, 0, 1, 0, 0])
    made = {
        "16 bit": Image.fromarray(np.where(MASK, 1, 0).astype(np.uint16)),
        "dark blue": Image.fromarray(colours),
        "dark blue and opaque": Image.fromarray(colours).convert("RGBA"),
        "palette": palette,
        "1 bit": Image.fromarray(MASK),
        "255": Image.fromarray(MASK.astype(np.uint8) * 255),
    }
    made[kind].save(path)


@pytest.mark.parametrize("kind", ["16 bit", "dark blue", "dark blue and opaque", "palette", "1 bit", "255"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_nonzero_pixel_belongs_to_the_mask(tmp_path: Path, kind: str, suffix: str) -> None:
    saved_mask(tmp_path / f"mask.{suffix}", kind)
    mask = read_mask(tmp_path / f"mask.{suffix}")
    assert mask.dtype == bool
    assert (mask == MASK).all()


def test_masks_get_the_same_exif_orientation_as_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.where(MASK, 3, 0).astype(np.uint16)).save(tmp_path / "mask.png", exif=exif)
    assert (read_mask(tmp_path / "mask.png") == np.rot90(MASK, -1)).all()


def test_crop_and_squash_give_the_expected_pixels() -> None:
    pixels = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    np.testing.assert_array_equal(crop(pixels, (0.25, 0.0, 0.75, 2849 / 2848)), pixels[:, 5:15])
    assert crop(pixels, None) is pixels
    np.testing.assert_array_equal(squash(np.full((10, 20, 1), 7, np.uint8), 5), np.full((5, 5, 1), 7))
    blocks = np.kron(np.array([[0, 100], [200, 40]], np.uint8), np.ones((4, 6), np.uint8))[..., None]
    np.testing.assert_array_equal(squash(blocks, 2)[..., 0], [[0, 100], [200, 40]])
    mask = np.kron(np.array([[0, 1], [1, 0]]), np.ones((5, 9))) > 0
    np.testing.assert_array_equal(squash_mask(mask, 4), np.kron([[0, 1], [1, 0]], np.ones((2, 2))) > 0)


def records(tmp_path: Path, content_hash: list[str], prefix: str = "r") -> list[Record]:
    made = []
    for i, content in enumerate(content_hash):
        path = tmp_path / f"{prefix}{i}.jpg"
        path.write_text(content)
        made.append(Record(path.stem, i % 2, path))
    return made


def test_identical_files_share_a_group(tmp_path: Path) -> None:
    paths = [r.path for r in records(tmp_path, ["aa", "bb", "aa", "c", "bb", "aa"])]
    assert identical_groups(paths) == [0, 1, 0, 3, 1, 0]


def test_copies_of_held_out_images_leave_training(tmp_path: Path) -> None:
    test = records(tmp_path, ["x", "y"], "test")
    kept, notes = without_copies(records(tmp_path, ["a", "y", "b"], "train"), test)
    assert [r.name for r in kept] == ["train0", "train2"]
    assert len(notes) == 1
    assert "train1 (class 1) is byte-identical to the held-out image test1 (class 1)" in notes[0]
    assert without_copies(kept, []) == (kept, [])


@pytest.mark.parametrize("seed", range(20))
def test_split_has_no_overlap_and_keeps_copies_together(tmp_path: Path, seed: int) -> None:
    content_hash = [str(i) for i in range(30)] + ["3", "3", "7"]
    every = records(tmp_path, content_hash)
    train, val, notes = split_off(every, 0.2, seed)
    names = {r.name for r in train} | {r.name for r in val}
    assert len(train) + len(val) == len(names) == 33
    assert len(val) == 7
    for group in ({"r3", "r30", "r31"}, {"r7", "r32"}):
        assert len({name in {r.name for r in val} for name in group}) == 1
    assert len(notes) == 2
    assert split_off(every, 0.2, seed)[1] == val
    assert split_off(every, 0.2, seed + 1)[1] != val


def test_a_fraction_outside_zero_and_one_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split off is 1\.5; it must lie between 0 and 1"):
        split_off(records(tmp_path, ["a", "b"]), 1.5, 0)


def test_bad_images_raise_or_are_skipped_and_reported(tmp_path: Path) -> None:
    write_image(tmp_path / "good.png", 0)
    (tmp_path / "bad.png").write_text("nothing")
    every = [Record("good", 0, tmp_path / "good.png"), Record("bad", 1, tmp_path / "bad.png")]
    with pytest.raises(BadImageError, match=r"bad\.png is not an image: replace it, or set on_bad_image: skip"):
        readable_records(every, "stop", [tmp_path])
    good, notes = readable_records(every, "skip", [tmp_path])
    assert [r.name for r in good] == ["good"]
    assert "skipped bad" in notes[0]
    masked = [Record("masked", 0, tmp_path / "good.png", (tmp_path / "bad.png",))]
    assert readable_records(masked, "skip", [tmp_path])[0] == []


@pytest.mark.parametrize("size", [0, 1, 16 * BLOCK, 16 * BLOCK + 1, 100 * BLOCK])
def test_content_hash_changes_with_size_head_middle_and_tail(tmp_path: Path, size: int) -> None:
    file, data = tmp_path / "a", bytes(range(256)) * (size // 256) + bytes(size % 256)
    places = {0, size // 2, size - 1} if 0 < size <= 16 * BLOCK else {0, size - 1} if size else set()
    changed = [data, data + b"x", *(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in places)]
    found = []
    for version in changed:
        file.write_bytes(version)
        found.append(content_hash(file))
    assert len(set(found)) == len(set(changed))
    (tmp_path / "copy").write_bytes(data)
    assert content_hash(tmp_path / "copy") == found[0]


def test_content_hash_samples_a_large_file_evenly(tmp_path: Path) -> None:
    size, file = 100 * BLOCK, tmp_path / "a"
    file.write_bytes(bytes(size))
    first, seen = content_hash(file), 0
    for place in range(0, size, BLOCK):
        data = bytearray(size)
        data[place : place + BLOCK] = b"x" * BLOCK
        file.write_bytes(data)
        seen += content_hash(file) != first
    assert 16 <= seen <= 32
