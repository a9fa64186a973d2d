"""A killed run goes on where it was."""

import csv
import re

import pytest
import torch
from command_line import run, run_and_kill

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run("fit", run_dir=folder)
    return folder


def table(folder):
    with open(folder / "test" / "scores.csv", newline="") as file:
        return {tuple(row[k] for k in ("index", "explainer", "metric")): row["value"] for row in csv.DictReader(file)}


def whole(folder, kind):
    return [p for p in (folder / "test" / kind).glob("*") if not p.name.startswith(".") and p.suffix != ".json"]


def taken(output, what):
    return int(re.search(rf"Read (?:the scores of )?(\d+) {what}", output).group(1))


def test_fit_continues_from_the_last_checkpoint(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    more = "--trainer.max_epochs=4"
    run_and_kill("fit", more, when=last.exists, run_dir=tmp_path)
    before = torch.load(last, weights_only=False, map_location="cpu")
    assert before["epoch"] < 3
    run("fit", more, "--ckpt_path=last", run_dir=tmp_path)
    after = torch.load(last, weights_only=False, map_location="cpu")
    assert after["epoch"] == 3
    assert after["global_step"] == 4 * 6
    with open(tmp_path / "logs" / "fit-1" / "metrics.csv", newline="") as file:
        epochs = {int(row["epoch"]) for row in csv.DictReader(file) if row.get("val/loss")}
    assert epochs == set(range(before["epoch"] + 1, 4))
    assert (tmp_path / "logs" / "fit").is_dir()


def test_a_resumed_fit_ends_like_an_undisturbed_one(tmp_path):
    more = "--trainer.max_epochs=3"
    run("fit", more, run_dir=tmp_path / "whole")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    run_and_kill("fit", more, when=last.exists, run_dir=tmp_path / "cut")
    run("fit", more, "--ckpt_path=last", run_dir=tmp_path / "cut")
    a, b = (
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        for n in ("whole", "cut")
    )
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.parametrize(("kind", "files"), [("maps", 3), ("scores", 4)])
def test_a_killed_test_takes_what_is_whole_from_disk(trained, tmp_path, kind, files):
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    undisturbed = run("test", checkpoint, run_dir=tmp_path / "whole")
    assert "from disk" not in undisturbed.stdout + undisturbed.stderr
    cut = tmp_path / "cut"
    run_and_kill("test", checkpoint, when=lambda: len(whole(cut, kind)) >= files, run_dir=cut)
    saved = {k: len(whole(cut, k)) for k in ("maps", "scores")}
    assert not (cut / "test" / "scores.csv").exists()
    again = run("test", checkpoint, run_dir=cut)
    output = again.stdout + again.stderr
    # Every whole file was used: nothing but the batch in flight is computed twice.
    assert taken(output, "maps") > 0
    if saved["scores"]:
        assert 4 * (saved["scores"] - 1) < taken(output, "samples") <= 4 * saved["scores"]
    assert _same(cut, tmp_path / "whole")


def _same(a, b):
    first, second = table(a), table(b)
    return first.keys() == second.keys() and all(
        float(first[k]) == pytest.approx(float(second[k]), abs=1e-6) for k in first
    )


def test_a_finished_test_is_not_computed_again(trained, tmp_path):
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    run("test", checkpoint, run_dir=tmp_path)
    first = (tmp_path / "test" / "scores.csv").read_bytes()
    files = {p: p.stat().st_mtime_ns for p in whole(tmp_path, "maps") + whole(tmp_path, "scores")}
    run("test", checkpoint, run_dir=tmp_path)
    assert (tmp_path / "test" / "scores.csv").read_bytes() == first
    assert {p: p.stat().st_mtime_ns for p in whole(tmp_path, "maps") + whole(tmp_path, "scores")} == files
