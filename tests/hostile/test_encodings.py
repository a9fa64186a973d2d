"""Texts of every kind that office programs and editors write: they are read, or one sentence names file and line."""

import pytest

from labn.io.readers import read_json, read_rows, read_text, read_yaml

ROWS = [["name", "label"], ["é", "1"], ["b", "0"]]
TABLE = "name,label\né,1\nb,0\n"
READ = {
    "marked": TABLE.encode("utf-8-sig"),
    "windows": TABLE.replace("\n", "\r\n").encode("utf-8-sig"),
    "old macintosh": TABLE.replace("\n", "\r").encode(),
    "without a last line break": TABLE.encode().rstrip(),
}
READERS = [read_text, read_yaml, lambda path: read_json(path, dict), lambda path: list(read_rows(path))]
REFUSED = {
    "latin-1": (TABLE.encode("latin-1"), "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    "utf-16": (TABLE.encode("utf-16"), "line 1: byte 0xff is not UTF-8; save the file as UTF-8"),
}


@pytest.mark.parametrize("kind", READ)
def test_tables_are_read(tmp_path, kind):
    (tmp_path / "a.csv").write_bytes(READ[kind])
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == ROWS


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("read", READERS)
def test_other_encodings_are_named_with_the_line(tmp_path, kind, read):
    data, message = REFUSED[kind]
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.csv, {message}"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("read", READERS)
def test_wide_letters_without_a_mark_are_no_text(tmp_path, encoding, read):
    (tmp_path / "a.csv").write_bytes("name\nb\n".encode(encoding))
    with pytest.raises(ValueError, match=r"a\.csv, line 1: "):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("text", ['\ufeff{"a": 1}', '{"a": 1}\r\n'])
def test_json_and_yaml_may_have_a_mark_and_windows_lines(tmp_path, text):
    (tmp_path / "a").write_text(text, newline="")
    assert read_json(tmp_path / "a", dict) == read_yaml(tmp_path / "a") == {"a": 1}
