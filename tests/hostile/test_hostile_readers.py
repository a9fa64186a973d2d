"""Data from strangers: bombs, tricks with paths and entities, and random damage end with a sentence."""

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import call_main
from fuzzing import (
    TARGETS,
    Fuzzer,
    Opened,
    picture,
    small,
    write_cub,
    write_folder,
    write_idrid,
    write_sun,
    write_years,
)
from hypothesis import given
from hypothesis import strategies as st
from small_voc import annotation, write_voc, xml

from datamodules import CUB, VOC, IDRiD, ImageFolder, Magnetogram
from datamodules.io.image_checks import image_error
from datamodules.magnetogram import Columns
from datamodules.voc import MAX_XML, read_annotation
from labn.io.fits import image_layout
from labn.io.images import MAX_PIXELS, BadImageError, read_image
from labn.io.memmap import write_npz
from labn.io.readers import path_inside, read_arrays, read_json, read_table, read_yaml

ROUNDS = 12
YEARS = {"train_years": [2015], "val_years": [2016], "test_years": [2017]}


@pytest.fixture(scope="module")
def opened():
    return Opened()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_files_raise_a_documented_error(tmp_path, opened, name):
    outcomes = Fuzzer(name, tmp_path, opened).run(f"short.{n}" for n in range(ROUNDS))
    assert outcomes.total() == ROUNDS


def png(width, height, rows=1):
    """A PNG that declares width x height grey pixels and holds few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (30_000, 30_000, "declares more than"),
        (12_000, 12_000, rf"declares 12000 x 12000 pixels, more than {MAX_PIXELS}"),
        (2**31 - 1, 2**31 - 1, "declares more than"),
        (100_000, 1, "longer side may be 256 times the shorter"),
        (1, 257, "longer side may be 256 times the shorter"),
    ],
)
def test_an_image_that_declares_too_many_pixels_is_not_decoded(tmp_path, width, height, message):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    tracemalloc.start()
    with pytest.raises(BadImageError, match=rf"bomb\.png .*{message}"):
        read_image(path)
    assert message.split(" ")[0] in str(image_error(path))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content", [b"GIF89a" + bytes(40), b"#!/bin/sh\n", b"%PDF-1.7\n", b"PK\x03\x04" + bytes(60), b""]
)
def test_content_that_is_not_an_image_raises_whatever_its_name(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert image_error(tmp_path / "a.jpg") == "is not an image"
    with pytest.raises(BadImageError, match=r"a\.jpg is not an image"):
        read_image(tmp_path / "a.jpg")


def test_a_pipe_raises_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert image_error(tmp_path / "a.png") == "cannot be read (not a regular file)"
    with pytest.raises(BadImageError, match="not a regular file"):
        read_image(tmp_path / "a.png")


def test_a_folder_given_as_a_picture_is_answered_with_what_to_give(tmp_path):
    with pytest.raises(BadImageError, match="is a folder; give the image files in it"):
        read_image(tmp_path)


def test_a_picture_with_the_suffix_of_another_format_is_read(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.JPEG")
    assert image_error(tmp_path / "a.JPEG") is None
    assert read_image(tmp_path / "a.JPEG").shape == (24, 24, 3)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a", "a/../../b", "..", "\\\\host\\a", "..\\a", "C:\\a", "", "  ", "a\0b", "a\nb", "x" * 300],
)
def test_paths_that_leave_the_folder_raise(tmp_path, name):
    with pytest.raises(ValueError, match=r"list\.txt, line 3: .* must be a path inside .*, without '\.\.'"):
        path_inside(tmp_path, name, "list.txt, line 3")


@pytest.mark.parametrize("name", ["a.png", "b/a.png", "..a.png", "a..b", "b/...", "C3.png"])
def test_paths_inside_the_folder_are_accepted(tmp_path, name):
    assert path_inside(tmp_path, name, "list") == tmp_path / name


def test_links_inside_the_folder_are_accepted_and_links_out_of_it_raise(tmp_path):
    root = tmp_path / "data"
    (root / "real").mkdir(parents=True)
    (root / "in").symlink_to(root / "real")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "linked").symlink_to(root)
    assert path_inside(tmp_path / "linked", "in/a.png", "list")
    with pytest.raises(
        ValueError, match=r"list, line 1: 'out/a\.png' is a link that leaves .*data; put the file itself"
    ):
        path_inside(root, "out/a.png", "list, line 1")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cub_list(root):
    write_cub(root)
    edit(root / "images.txt", "001.Bird/bird_0_2.png", "001.Bird/../../secret.png")
    return small(CUB, resize=8), r"images\.txt, line 3: '001\.Bird/\.\./\.\./secret\.png' must be a path inside"


def voc_list(root):
    write_voc(root)
    edit(root / "ImageSets" / "Main" / "val.txt", "d", "../../secret")
    return small(VOC), r"val\.txt, line 1: '\.\./\.\./secret\.xml' must be a path inside"


def sun_table(root):
    write_sun(root)
    edit(root / "labels.csv", "sun_2016.png", "/etc/secret.png")
    read = small(Magnetogram, **YEARS, labels="labels.csv", columns=Columns(time="when"))
    return read, r"labels\.csv, line 5: '/etc/secret\.png' must be a path inside"


def idrid_table(root):
    write_idrid(root)
    edit(root / "segmentation_to_grading.csv", "a. Training Set,IDRiD_01", "../..,IDRiD_01")
    return small(
        IDRiD, cache_images=False
    ), r"segmentation_to_grading\.csv, line 2: '\.\./\.\./IDRiD_01' must be a path"


def test_an_absolute_image_name_in_the_table_of_lesions_is_no_pattern(tmp_path):
    write_idrid(tmp_path)
    edit(tmp_path / "segmentation_to_grading.csv", "IDRiD_01", "/etc/passwd")
    small(IDRiD, cache_images=False, augmentation=None)(tmp_path)


def linked_image(root):
    write_folder(root)
    picture(root.parent / "secret.png")
    (root / "ant" / "9.png").symlink_to(root.parent / "secret.png")
    return small(ImageFolder, strict_links=True), r"ant/9\.png is a link that leaves the data folder"


def linked_secret(root):
    write_folder(root)
    (root.parent / "secret.txt").write_text("password")
    (root / "ant" / "9.png").symlink_to(root.parent / "secret.txt")
    return small(ImageFolder), r"ant/9\.png is a link that leaves the data folder"


@pytest.mark.parametrize("trick", [cub_list, voc_list, sun_table, idrid_table, linked_image, linked_secret])
def test_hostile_paths_raise_an_error_with_file_and_line(tmp_path, trick):
    (tmp_path / "data").mkdir()
    read, message = trick(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "data")


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "start",
    [LAUGHS + "]>", '<!DOCTYPE a [<!ENTITY j SYSTEM "file:///etc/passwd">]>', '<!DOCTYPE a SYSTEM "http://x/y.dtd">'],
)
def test_xml_entities_raise(tmp_path, start, encoding):
    write_voc(tmp_path / "voc")
    path = annotation(tmp_path / "voc", "a")
    path.write_bytes(("\n" + start + xml([("&j;", (1, 1, 9, 9))])).lstrip().encode(encoding))
    with pytest.raises(ValueError, match=r"a\.xml, line 1: it declares a document type"):
        read_annotation(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "9" * 500, "", "1_0_0", "0x10"])
@pytest.mark.parametrize("field", ["width", "xmax"])
def test_xml_numbers_that_are_not_pixels_raise(tmp_path, field, value):
    path = tmp_path / "a.xml"
    path.write_text(xml([("cat", (1, 1, 9, 9))]))
    old = {"width": "<width>60<", "xmax": "<xmax>9<"}[field]
    edit(path, old, f"{old.partition('>')[0]}>{value}<")
    if value == "1_0_0":
        value = ""
        edit(path, "1_0_0", "")
    with pytest.raises(ValueError, match=rf"a\.xml.*{field}.* must be a number of pixels"):
        read_annotation(path)


def test_a_huge_annotation_raises_without_being_read(tmp_path):
    with (tmp_path / "a.xml").open("wb") as file:
        file.truncate(MAX_XML + 1)
    with pytest.raises(ValueError, match=r"a\.xml is larger than"):
        read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ({"NAXIS1": "-4"}, "declares -4 x 8 pixels"),
        ({"NAXIS1": "99999999", "NAXIS2": "99999999"}, "declares 99999999 x 99999999 pixels"),
        ({"BITPIX": "'a'"}, "BITPIX is 'a'; it must be an integer"),
        ({"NAXIS1": "8.5"}, "NAXIS1 is 8.5; it must be an integer"),
    ],
)
def test_wrong_fits_headers_raise(tmp_path, cards, message):
    write_sun(tmp_path)
    path = tmp_path / "2015.fits"
    data = path.read_bytes()
    for name, value in cards.items():
        start = data.index(name.ljust(8).encode())
        data = data[:start] + f"{name:8}= {value:>20}".ljust(80).encode() + data[start + 80 :]
    path.write_bytes(data)
    with pytest.raises(BadImageError, match=rf"2015\.fits.*{message}"):
        image_layout(path)


@pytest.mark.parametrize("make", ["objects", "archive", "huge", "flat"])
def test_files_that_are_not_arrays_of_frames_raise(tmp_path, make):
    write_years(tmp_path)
    path = tmp_path / "2016.npy"
    if make == "objects":
        np.save(path, np.array([{"a": 1}] * 4), allow_pickle=True)
    elif make == "archive":
        np.savez(tmp_path / "x.npz", a=np.zeros(3))
        (tmp_path / "x.npz").rename(path)
    elif make == "huge":
        data = path.read_bytes()
        path.write_bytes(data.replace(b"(4, 16, 16)", b"(4, 10**9,)"))
    else:
        np.save(path, np.zeros((4, 1, 300), np.uint8))
    with pytest.raises(ValueError, match=r"2016\.npy (is not a whole|holds frames of 1 x 300)"):
        small(Magnetogram, **YEARS)(tmp_path)


def test_arrays_that_are_too_large_or_pickled_raise(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(2**21))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"bomb\.npz is not a complete archive of arrays \(it unpacks to \d+ bytes"):
        read_arrays(tmp_path / "bomb.npz", limit=2**20)
    assert read_arrays(tmp_path / "bomb.npz", limit=2**25)["a"].shape == (2**21,)
    np.savez(tmp_path / "pickled.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(
        ValueError, match=r"pickled\.npz is not a complete archive of arrays \(Object arrays cannot be loaded"
    ):
        read_arrays(tmp_path / "pickled.npz")


def test_errors_of_tables_and_manifests_name_the_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"index,value\n1,2\n3,\xff\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: byte 0xff is not UTF-8"):
        list(read_table(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("index,value\n1,2\n3,x\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: value is 'x'; it must be a number"):
        [row.number("value", float) for row in read_table(tmp_path / "a.csv")]
    (tmp_path / "a.csv").write_text('index,value\n1,"' + "x" * 200_000 + '"\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 2: not CSV \(field larger than field limit"):
        list(read_table(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("index\n")
    with pytest.raises(ValueError, match=r"a\.csv has no column 'name'"):
        list(read_table(tmp_path / "a.csv", ("name",)))
    for text, message in (
        ("{\n,", "line 2: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not JSON"),
        ("[1]", "holds a list"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
            read_json(tmp_path / "a.json", dict)


def test_a_missing_image_raises_an_error_that_names_it(tmp_path):
    with pytest.raises(BadImageError, match=r"gone\.png cannot be read \(No such file or directory\)"):
        read_image(Path(tmp_path / "gone.png"))


def laughs(levels, width=10, link="[{}]"):
    """Every level is `width` times the one before, by aliases."""
    lines = ["a0: &a0 [x, y]" if link == "[{}]" else "a0: &a0 {x: 1, y: 2}"]
    for n in range(1, levels + 1):
        lines.append(f"a{n}: &a{n} " + link.format(", ".join([f"*a{n - 1}"] * width)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), r"a\.yaml holds more than 100000 values where its aliases \(\*name\) are written out"),
        (laughs(9, link="{{<<: [{}]}}"), r"a\.yaml holds more than 100000 values"),
        ("a: &a [*a]", r"a\.yaml is nested too deeply, or an alias in it stands for itself"),
        ("[" * 5000, r"a\.yaml is nested too deeply"),
        ("a: 1\nb: ]", r"a\.yaml, line 2: not YAML"),
        ("a: !!python/object/apply:os.getcwd []", r"a\.yaml, line 1: not YAML \(could not determine a constructor"),
        ("a: 2020-99-99", r"a\.yaml: not YAML \(month must be"),
        ("a: \x07", r"a\.yaml: not YAML"),
    ],
)
def test_a_configuration_with_too_many_aliases_raises(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "a.yaml")


@given(levels=st.integers(0, 3), width=st.integers(1, 4))
def test_values_are_counted_with_aliases_expanded(tmp_path_factory, levels, width):
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(laughs(levels, width))
    sizes = [3]
    for _ in range(levels):
        sizes.append(1 + width * sizes[-1])
    count = 1 + len(sizes) + sum(sizes)
    assert read_yaml(path, count)["a0"] == ["x", "y"]
    with pytest.raises(ValueError, match=f"more than {count - 1} values"):
        read_yaml(path, count - 1)


@pytest.mark.parametrize("nested", [False, True])
def test_the_command_line_raises_for_an_alias_bomb_before_expanding_it(tmp_path, monkeypatch, nested):
    monkeypatch.setattr("labn.io.readers.MAX_NODES", 500)
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(laughs(3))
    (tmp_path / "run.yaml").write_text("include: [bomb.yaml]")
    config = tmp_path / "run.yaml" if nested else bomb
    with pytest.raises(ValueError, match=f"{bomb} holds more than 500 values"):
        call_main(["fit", "--config", str(config)])


@pytest.mark.parametrize("on_disk", [False, True])
def test_arrays_are_read_completely_or_raise(tmp_path, on_disk):
    scratch_dir = tmp_path if on_disk else None
    rows = np.random.default_rng(0).random((5000, 3), dtype=np.float32)
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        write_npz(
            file, [("a/x", rows.shape, rows.dtype, [rows[:4096], rows[4096:]]), ("i", (2,), np.dtype(int), [[1, 2]])]
        )
    found = read_arrays(path, scratch_dir=scratch_dir)
    assert list(found) == ["a/x", "i"]
    assert (found["a/x"] == rows).all()
    assert isinstance(found["a/x"], np.memmap) == on_disk
    data = bytearray(path.read_bytes())
    data[30_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is not a complete archive of arrays"):
        read_arrays(path, scratch_dir=scratch_dir)
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is not a complete archive of arrays"):
        read_arrays(path, scratch_dir=scratch_dir)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
