"""Names in tables: no spreadsheet calculates them, and they read back as they were."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_stage import make_stage

from labn.io.readers import read_rows
from labn.io.table_cells import csv_bytes, escaped_cell, unescaped_cell, write_csv
from labn.results.reader import read_stage

NAMES = [
    "=1+1",
    "+x",
    "-labn",
    "@a",
    "\ttab",
    "\rcr",
    "\nlf",
    "＝1",
    "'=x",
    "''@",
    "'tis",
    "a=b",
    " =1",
    "a\rb",
    'q"',
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reads_back_as_it_was_and_is_no_formula(tmp_path, name):
    write_csv(tmp_path / "a.csv", ["name", name], [[name, 1], ["b", name]])
    rows = [row for _, row in read_rows(tmp_path / "a.csv", escaped=True)]
    assert rows == [["name", name], [name, "1"], ["b", name]]
    with (tmp_path / "a.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(tuple("=+-@\t\r\n＝＋－＠")) for cell in cells)


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_every_text_reads_back(text):
    assert unescaped_cell(escaped_cell(text)) == text


@pytest.mark.parametrize("value", [-0.5, -3, float("-inf"), "-0.5", "+1", "-1e-05", "-inf", "-1"])
def test_numbers_stay_numbers(value):
    assert csv_bytes(["a"], [[value]]) == f"a\n{value}\n".encode()


def test_a_table_that_is_read_and_written_again_stays_as_it_was(tmp_path):
    data = csv_bytes(["a", "=b"], [[-0.5, "=1"], ["x", "-y"]])
    for _ in range(3):
        (tmp_path / "a.csv").write_bytes(data)
        header, *rows = [row for _, row in read_rows(tmp_path / "a.csv", escaped=True)]
        assert csv_bytes(header, rows) == data


def test_negated_methods_and_hostile_names_are_read_from_a_results_folder(tmp_path):
    folder = make_stage(tmp_path / "run", 6, explainers=("labn", "-labn", "=evil()"))
    results = read_stage(folder)
    assert results.explainers == ["labn", "-labn", "=evil()"]
    assert {row["explainer"] for row in results.summary} == {"labn", "-labn", "=evil()"}
    assert {row["explainer_b"] for row in results.paired} == {"-labn", "=evil()"}
    text = (folder / "scores.csv").read_text()
    assert ",'=evil()," in text
    assert ",-labn," in text


def test_tables_of_others_are_read_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("name,label\n'=x, 1\n")
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [["name", "label"], ["'=x", "1"]]
