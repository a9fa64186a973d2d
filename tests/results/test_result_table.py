"""`labn.results.read`, and the two files of per-sample scores."""

import csv
import importlib.util

import numpy as np
import pytest
from small_stage import HOSTILE, make_stage

from labn import results
from labn.results import result_table, score_files
from labn.results.score_files import SCORES, ScoreBlock, write_score_csv, write_score_parquet
from labn.results.tables import write_csv

NAMES = ["a.png", "=1+1.png", "new\nline", "carriage\rreturn", 'quo"te, comma', "", "ü"]
PAIRS = [("gradcam", "pid16"), ("-labn", "pid16"), ("=x", "v"), ("re\rturn", "v"), ("a,b", 'w"')]


@pytest.fixture(params=[PAIRS, PAIRS[:3]], ids=["with a carriage return in a method", "without"])
def pairs(request):
    return request.param


def blocks(pairs, count=20):
    noise = np.random.default_rng(0)
    for start in range(0, count, 6):
        index = np.arange(start, min(start + 6, count))
        values = noise.random((len(pairs), len(index)))
        values[noise.random(values.shape) < 0.2] = np.nan
        values[0, 0], values[-1, 0] = np.inf, -0.0
        targets = noise.integers(0, 3, values.shape)
        yield ScoreBlock(index, [NAMES[i % len(NAMES)] for i in index], index % 2, targets, values)


def rows(pairs):
    for block in blocks(pairs):
        for n, index in enumerate(block.index.tolist()):
            for c, (explainer, metric) in enumerate(pairs):
                if not np.isnan(value := float(block.values[c, n])):
                    label, target = int(block.label[n]), int(block.targets[c, n])
                    yield "test", index, block.names[n], label, target, explainer, metric, value


@pytest.mark.parametrize("split", ["test", "=test", "te\rst"])
def test_scores_csv_has_the_bytes_of_a_table_written_row_by_row(tmp_path, pairs, split):
    write_score_csv(tmp_path / "fast.csv", split, pairs, blocks(pairs))
    write_csv(tmp_path / "slow.csv", SCORES, ((split, *row[1:]) for row in rows(pairs)))
    assert (tmp_path / "fast.csv").read_bytes() == (tmp_path / "slow.csv").read_bytes()


def test_both_files_are_read_as_the_rows_that_were_written(tmp_path, pairs):
    pytest.importorskip("pyarrow")
    expected = [("test", *row[1:]) for row in rows(pairs)]
    write_score_csv(tmp_path / "scores.csv", "test", pairs, blocks(pairs))
    text = results.read(tmp_path)
    write_score_parquet(tmp_path / "scores.parquet", "test", pairs, blocks(pairs))
    columnar = results.read(tmp_path)
    for table in (text, columnar):
        assert table.columns == SCORES
        assert list(table.rows) == expected
        assert [table[name].dtype.kind for name in ("index", "label", "target", "value")] == ["i", "i", "i", "f"]


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    write_score_csv(tmp_path / "scores.csv", "test", PAIRS, blocks(PAIRS))
    (tmp_path / "scores.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match=r"scores\.parquet is not a complete Parquet file"):
        results.read(tmp_path)


def test_without_pyarrow_there_is_no_parquet_file_and_the_csv_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("labn.results.tables.has_pyarrow", lambda: False)
    monkeypatch.setattr(result_table, "has_pyarrow", lambda: False)
    folder = make_stage(tmp_path, 6)
    assert not (folder / "scores.parquet").exists()
    assert len(results.read(tmp_path)) == 6 * 4


def test_a_run_has_a_parquet_file_if_pyarrow_is_installed(tmp_path):
    folder = make_stage(tmp_path, 6)
    assert (folder / "scores.parquet").exists() == score_files.has_pyarrow()
    assert score_files.has_pyarrow() == (importlib.util.find_spec("pyarrow") is not None)


def test_every_table_of_a_run_folder_is_read(tmp_path):
    folder = make_stage(tmp_path, 12, groups={index: index // 2 for index in range(12)})
    for name in result_table.NAMES[:-1]:
        with open(folder / f"{name}.csv", newline="") as file:
            header, *lines = csv.reader(file)
        table = results.read(tmp_path, name)
        assert (list(table.columns), len(table)) == (header, len(lines))
        assert list(results.read(folder, name).rows) == list(table.rows)
    scores = results.read(tmp_path)
    assert HOSTILE in scores["name"]
    mean = results.read(tmp_path, "summary").where(explainer="-lrp", metric="mass")["mean"].item()
    assert scores.where(explainer="-lrp", metric="mass")["value"].mean() == pytest.approx(mean, abs=1e-12)
    assert results.read(tmp_path, "predictions")["group"].tolist() == [index // 2 for index in range(12)]


def test_a_table_becomes_a_data_frame(tmp_path):
    pytest.importorskip("pandas")
    make_stage(tmp_path, 6)
    table = results.read(tmp_path, "ranks")
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert frame["p_best"].tolist() == table["p_best"].tolist()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown table 'means'; there are scores, summary"):
        results.read(tmp_path, "means")
    with pytest.raises(FileNotFoundError, match=r"holds no test/counts\.csv"):
        results.read(tmp_path, "counts")
    folder = make_stage(tmp_path, 4)
    with pytest.raises(ValueError, match="has no column 'means', only explainer, metric"):
        results.read(tmp_path, "summary")["means"]
    path = folder / "summary.csv"
    path.write_text(path.read_text().replace(",4\n", ",9999999999999999999999\n", 1))
    with pytest.raises(ValueError, match=r"summary\.csv, line 2: n is '9999999999999999999999'"):
        results.read(tmp_path, "summary")
