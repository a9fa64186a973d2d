"""Curves, bands, charts and training logs, against closed forms."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_stage import CLASSES, PATCH, SIZE, make_stage

from labn.io.memmap import temporary_memmap
from labn.report import RunInfo, curves, render, run_report
from labn.report.caveats import caveats
from labn.report.charts import HEIGHT, WIDTH, Panel, Series, nice_ticks
from labn.report.curves import GRID, band, bands, curve_panels, on_grid
from labn.report.training import training_panels
from labn.results.reader import StageResults, Total, read_stage
from labn.results.training_logs import read_training


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_evenly_spaced_within_the_limits(low, width):
    ticks = nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    assert low - width * 1e-6 <= ticks[0] <= ticks[-1] <= low + width * (1 + 1e-6)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-3)


def test_ticks_of_epochs_are_integers():
    assert nice_ticks(0, 2, least=1.0) == [0, 1, 2]


def test_curves_are_interpolated_on_one_grid():
    x = np.array([[0.0, 0.5, 1.0], [0.0, 0.25, 1.0]])
    y = np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    curves = on_grid(x, y)
    assert curves.shape == (2, len(GRID))
    assert curves[0, 25] == pytest.approx(0.5)
    assert curves[1, 25] == 1


def test_the_band_of_equal_curves_has_no_width_and_that_of_two_has_both():
    mean, low, high = band(np.tile(GRID, (5, 1)))
    assert np.allclose([low, high], mean)
    mean, low, high = band(np.stack([np.zeros(3), np.ones(3)]))
    assert np.allclose([mean, low, high], [[0.5] * 3, [0.0] * 3, [1.0] * 3])


def test_the_band_of_groups_is_that_of_their_means_and_wider_than_that_of_samples():
    days = np.arange(8.0)[:, None] * [1.0, -2.0]
    mean, low, high = band(np.repeat(days, 24, axis=0), np.repeat(np.arange(8) + 736000, 24))
    assert np.allclose([mean, low, high], band(days))
    _, narrow, wide = band(np.repeat(days, 24, axis=0))
    assert ((wide - narrow) < (high - low) / 3).all()


def test_the_band_of_groups_weights_groups_by_their_size():
    # Three samples of one group and one of another: drawn with means 0, 1/4 and 1.
    mean, low, high = band(np.array([[0.0], [0.0], [1.0], [0.0]]), np.array([5, 5, 9, 5]))
    assert (mean.item(), low.item(), high.item()) == (0.25, 0.0, 1.0)


def test_many_tables_on_disk_have_the_bands_of_each_alone(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    x = np.sort(noise.random((60, 7)))
    tables = [(on_grid(x[:n], noise.random((n, 7))), g) for n, g in ((60, None), (60, np.arange(60) // 7), (20, None))]
    expected = [band(*table) for table in tables]
    monkeypatch.setattr(curves, "_BLOCK", 900)
    stored = []
    for grid, groups in tables:
        kept = temporary_memmap(grid.shape, float, tmp_path)
        kept[:] = grid
        stored.append((kept, groups))
    for found, wanted in zip(bands(stored), expected):
        np.testing.assert_allclose(found, wanted, rtol=1e-13)
    y = noise.random((60, 7))
    np.testing.assert_array_equal(on_grid(x, y, tmp_path), on_grid(x, y))
    assert not list(tmp_path.iterdir())


def test_panels_hold_the_means_in_the_order_of_the_table():
    x = np.tile([0.0, 1.0], (2, 1))
    lines = {"x": x, "insertion": np.array([[0, 1.0], [0, 0.5]]), "deletion": 1 - x}
    curves = {f"a/pid16/{name}": values for name, values in lines.items()}
    insertion, deletion = curve_panels(curves, ["none", "a"], "pid16")
    assert [(s.name, s.place) for s in insertion.series] == [("a", 1)]
    assert insertion.series[0].y[-1] == 0.75
    assert deletion.title == "pid16: deletion"


def test_lines_stay_inside_their_frame():
    wave = np.array([3.0, -2.0, np.nan, 7.0])
    (line,) = Panel("t", "x", "y", (Series("s", 0, np.arange(4.0), wave, wave - 1, wave + 1),)).lines
    assert len(line.dots) == 3
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in line.dots)
    assert line.band.startswith("M")
    assert line.band.endswith("Z")


def test_logs_of_a_resumed_run_are_one_curve(tmp_path):
    for name, rows in (("fit", ["0,,2.0", "1,,1.0"]), ("fit-1", ["1,,1.5", "2,0.5,"])):
        (tmp_path / "logs" / name).mkdir(parents=True)
        text = "\n".join(["epoch,val/loss,train/loss", *rows])
        (tmp_path / "logs" / name / "metrics.csv").write_text(text + "\n")
    values = read_training(tmp_path)
    assert values == {"train/loss": {0: 2.0, 1: 1.5}, "val/loss": {2: 0.5}}
    (panel,) = training_panels(values)
    assert [line.name for line in panel.series] == ["train", "val"]
    assert read_training(tmp_path, before=2) == {"train/loss": {0: 2.0, 1: 1.5}}
    assert read_training(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("groups", [None, {index: index // 4 for index in range(24)}])
def test_a_page_does_not_depend_on_what_is_kept_in_memory(tmp_path, groups):
    folder = make_stage(tmp_path, groups=groups)
    info = RunInfo("t", tmp_path, CLASSES, 24, {}, player={"metric": "pid16", "patch": PATCH, "size": [SIZE, SIZE]})
    whole = read_stage(folder)
    few = read_stage(folder, {card["index"] for card in whole.cards}, folder)
    assert render(run_report(few, info)) == render(run_report(whole, info))
    none = read_stage(folder, set(), folder)
    assert (none.names, set(map(len, none.scores.values()))) == ({}, {0})
    assert none.explainers == whole.explainers
    assert caveats(none) == caveats(whole)


def test_groups_are_read_with_the_curves_and_named_in_the_caveats(tmp_path):
    folder = make_stage(tmp_path, 8, groups={index: 7 + index // 4 for index in range(8)})
    results = read_stage(folder)
    assert results.groups == {index: 7 + index // 4 for index in range(8)}
    assert results.curves["-lrp/pid16/group"].tolist() == [7] * 4 + [8] * 4
    notes = caveats(results)
    assert "Some values are based on 2 groups of samples: intervals of so few are too narrow." in notes
    assert "Intervals are 95 % bootstrap intervals over whole groups of samples." in notes
    plain = read_stage(make_stage(tmp_path / "plain", 8))
    assert plain.groups is None
    assert "gradcam/pid16/group" not in plain.curves
    assert "Intervals are 95 % bootstrap intervals over the samples." in caveats(plain)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test,1,image_001,1,1,0.5,", "predictions.csv, line 3: group is ''"),
        ("test,1,image_001,1,1,0.5,1" + "0" * 30, "predictions.csv, line 3: group is '10000"),
        ("", "predictions.csv has no group for image_001"),
    ],
)
def test_a_damaged_group_raises_and_is_named(tmp_path, line, message):
    path = make_stage(tmp_path, 4, groups=dict.fromkeys(range(4), 7)) / "predictions.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_stage(path.parent)


def test_a_high_fill_probability_has_a_caveat(tmp_path):
    totals = {("a", "fill_probability"): Total(2, 1.0), ("a", "pid16@official"): Total(1, 0.1)}
    scores = {key: {} for key in totals}
    manifest = {"settings": {"n_steps": 10, "precision": "bf16"}}
    notes = caveats(StageResults(tmp_path, scores, totals, manifest=manifest))
    for words in ("mean probability of 0.500", "a constant map scores high", "n_steps = 10", "bf16"):
        assert any(words in note for note in notes)
    assert caveats(StageResults(tmp_path)) == []


@pytest.mark.parametrize(
    ("means", "quantity", "said"),
    [
        ({"gradcam": 0.009, "random": -0.004, "constant": 0.3}, "softmax", True),
        ({"gradcam": 0.009, "random": 0.02}, "softmax", False),
        ({"gradcam": -0.01, "random": 0.0}, "softmax", False),
        ({"gradcam": 0.009, "random": 0.0}, "logit", False),
    ],
)
def test_a_caveat_says_that_curves_are_flat(tmp_path, means, quantity, said):
    rows = [(e, metric, value) for e, mean in means.items() for metric, value in (("pid16@official", mean), ("id", 1))]
    summary = [{"explainer": e, "metric": m, "mean": str(v), "n": "20"} for e, m, v in rows]
    results = StageResults(tmp_path, summary=summary, manifest={"settings": {"probability": quantity}})
    flat = [note for note in caveats(results) if "next to nothing" in note]
    assert [note.partition(":")[0] for note in flat] == ["pid16@official"] * said


@pytest.mark.parametrize(
    ("given", "classes", "names", "which"),
    [
        (True, [2, 3], ["O", "C", "M", "X"], "'M', 'X'"),
        ([0], [0], ["cat", "dog"], "'cat'"),
        (True, list(range(1, 13)), [f"c{k}" for k in range(13)], "12 of the 13 classes"),
        (True, [0, 1], ["cat", "dog"], None),
        (False, None, ["cat", "dog"], None),
        (True, None, ["cat", "dog"], "the data's positive classes"),
    ],
)
def test_a_caveat_names_the_positive_classes(tmp_path, given, classes, names, which):
    manifest = {"settings": {"positives_only": given}, "positive_classes": classes, "class_names": names}
    said = [] if which is None else [f"Metrics that perturb images are scored on samples of {which} only."]
    assert caveats(StageResults(tmp_path, manifest=manifest)) == said


@pytest.mark.parametrize(
    ("target", "settings", "said"),
    [
        ("prediction", {"score_class": "target"}, ["the class that the network predicts", "for the same class."]),
        ("top2", {"score_class": "predicted"}, ["in place 2 of the network's prediction", "for the predicted class."]),
        ("1", {"score_class": "label"}, ["the class 'dog' in every picture", "for the true class."]),
        ("1", {}, ["Insertion and deletion measure the network's output for the true class;"]),
    ],
)
def test_a_caveat_says_in_plain_words_which_class_is_explained_and_scored(tmp_path, target, settings, said):
    manifest = {"target": target, "settings": settings, "class_names": ["cat", "dog"]}
    (note,) = caveats(StageResults(tmp_path, manifest=manifest))
    assert all(words in note for words in said)
    assert "score_class" not in note


def test_a_caveat_counts_the_samples_that_were_left_out(tmp_path):
    """With `limit_test_batches` they are the first ones."""
    notes = caveats(StageResults(tmp_path, manifest={"samples": 2}), split_size=4)
    assert notes == ["Only 2 of the 4 samples were explained and scored."]
