"""A killed run goes on where it was."""

import csv
import re

import pytest
import torch
from command_line import run, run_and_kill

pytestmark = pytest.mark.slow
EPOCHS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run("fit", f"--trainer.max_epochs={EPOCHS}", run_dir=folder)
    return folder


def table(folder):
    with open(folder / "test" / "scores.csv", newline="") as file:
        return {tuple(row[k] for k in ("index", "explainer", "metric")): row["value"] for row in csv.DictReader(file)}


def whole(folder, kind):
    return [p for p in (folder / "test" / kind).glob("*") if not p.name.startswith(".") and p.suffix != ".json"]


def taken(output, what):
    return int(re.search(rf"Read (?:the scores of )?(\d+) {what}", output).group(1))


def test_a_killed_fit_goes_on_from_its_last_checkpoint_and_ends_like_an_undisturbed_one(trained, tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    more = f"--trainer.max_epochs={EPOCHS}"
    run_and_kill("fit", more, when=last.exists, run_dir=tmp_path)
    before = torch.load(last, weights_only=False, map_location="cpu")
    assert before["epoch"] < EPOCHS - 1
    run("fit", more, "--ckpt_path=last", run_dir=tmp_path)
    after = torch.load(last, weights_only=False, map_location="cpu")
    assert (after["epoch"], after["global_step"]) == (EPOCHS - 1, 6 * EPOCHS)
    with open(tmp_path / "logs" / "fit-1" / "metrics.csv", newline="") as file:
        epochs = {int(row["epoch"]) for row in csv.DictReader(file) if row.get("val/loss")}
    assert epochs == set(range(before["epoch"] + 1, EPOCHS))
    assert (tmp_path / "logs" / "fit").is_dir()
    whole = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert all(torch.allclose(whole[name], after["state_dict"][name], atol=1e-6) for name in whole)


@pytest.fixture(scope="module")
def tested(trained, tmp_path_factory):
    """An undisturbed test, which takes nothing from disk."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    assert "from disk" not in run("test", checkpoint, run_dir=folder).output
    return folder


@pytest.mark.parametrize(("kind", "files"), [("maps", 3), ("scores", 4)])
def test_a_killed_test_takes_what_is_whole_from_disk(trained, tested, tmp_path, kind, files):
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    cut = tmp_path / "cut"
    run_and_kill("test", checkpoint, when=lambda: len(whole(cut, kind)) >= files, run_dir=cut)
    saved = {k: len(whole(cut, k)) for k in ("maps", "scores")}
    assert not (cut / "test" / "scores.csv").exists()
    output = run("test", checkpoint, run_dir=cut).output
    # Every whole file was used: nothing but the batch in flight is computed twice.
    assert taken(output, "maps") > 0
    if saved["scores"]:
        assert 4 * (saved["scores"] - 1) < taken(output, "samples") <= 4 * saved["scores"]
    assert _same(cut, tested)


def _same(a, b):
    first, second = table(a), table(b)
    return first.keys() == second.keys() and all(
        float(first[k]) == pytest.approx(float(second[k]), abs=1e-6) for k in first
    )


def test_a_finished_test_is_not_computed_again(trained, tested):
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    first = (tested / "test" / "scores.csv").read_bytes()
    files = {p: p.stat().st_mtime_ns for p in whole(tested, "maps") + whole(tested, "scores")}
    run("test", checkpoint, run_dir=tested)
    assert (tested / "test" / "scores.csv").read_bytes() == first
    assert {p: p.stat().st_mtime_ns for p in whole(tested, "maps") + whole(tested, "scores")} == files
