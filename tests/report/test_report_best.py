"""The best values of a column: closed forms of which cells are marked."""

import math

from labn.report.best import both_directions, with_best
from labn.report.page import Cell, Table

NAN = math.nan


def cell(mean, half=0.05, n=20):
    return Cell(mean, mean - half, mean + half, n)


def marked(column, cells, pairs=(), quantity="probability"):
    table = Table("", (column,), {name: [c] for name, c in cells.items()})
    found = with_best(table, {column: both_directions(pairs)} if pairs else {}, quantity).best
    assert {place for _, place in found} <= {column}
    return {row for row, _ in found}


def test_the_better_end_of_the_value_decides():
    cells = {"a": cell(0.8), "b": cell(0.2), "c": None}
    assert marked("pid16", cells) == {"a"}
    assert marked("deletion16", cells) == {"b"}
    assert marked("fill_probability", cells) == set()
    assert marked("deletion16", cells, quantity="logit") == {"b"}


def test_a_paired_difference_that_includes_zero_marks_both():
    cells = {"a": cell(0.8), "b": cell(0.7), "c": cell(0.69)}
    open_one, decided = Cell(0.1, -0.01, 0.2, 20), Cell(0.11, 0.05, 0.2, 20)
    assert marked("pid16", cells, [("a", "b", open_one), ("a", "c", decided)]) == {"a", "b"}
    # The file may hold the pair in the other direction.
    turned = Cell(-0.11, -0.2, -0.05, 20)
    assert marked("pid16", cells, [("b", "a", open_one), ("c", "a", turned)]) == {"a", "b"}


def test_of_a_value_that_should_be_low_the_signs_are_opposite():
    cells = {"a": cell(0.2), "b": cell(0.3)}
    assert marked("deletion16", cells, [("a", "b", Cell(-0.1, -0.2, -0.05, 20))]) == {"a"}
    assert marked("deletion16", cells, [("a", "b", Cell(-0.1, -0.2, 0.01, 20))]) == {"a", "b"}


def test_without_paired_differences_overlapping_intervals_leave_it_open():
    assert marked("pid16", {"a": cell(0.8), "b": cell(0.72)}) == {"a", "b"}
    assert marked("pid16", {"a": cell(0.8), "b": cell(0.69)}) == {"a"}


def test_a_single_sample_or_a_single_row_marks_nothing():
    assert marked("pid16", {"a": Cell(0.8, NAN, NAN, 1), "b": Cell(0.2, NAN, NAN, 1)}) == set()
    assert marked("pid16", {"a": cell(0.8)}) == set()
    assert marked("pid16", {"a": Cell(NAN, NAN, NAN, 0), "b": cell(0.3)}) == set()
