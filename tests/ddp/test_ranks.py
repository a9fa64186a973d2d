"""The same command on one and on two processes writes the same results."""

import csv

import pytest
from command_line import run

TWO = ["--config", "configs/parts/ddp_cpu.yaml"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a checkpoint, trained on two processes with every callback on."""
    folder = tmp_path_factory.mktemp("trained")
    run("fit", *TWO, run_dir=folder)
    return folder


def rows(folder, name):
    with open(folder / "test" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_fit_on_two_processes_leaves_checkpoints_and_validation_results(trained):
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert (trained / "val" / "epoch=001" / "scores.csv").exists()


@pytest.mark.parametrize("images", [13, 12])
def test_two_processes_write_the_rows_of_one(trained, tmp_path, images):
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    size = f"--data.init_args.n_test={images}"
    run("test", checkpoint, size, run_dir=tmp_path / "one")
    run("test", *TWO, checkpoint, size, run_dir=tmp_path / "two")
    one, two = (rows(tmp_path / name, "scores.csv") for name in ("one", "two"))
    seen = [rows(tmp_path / name, "predictions.csv") for name in ("one", "two")]
    assert [[int(row["index"]) for row in each] for each in seen] == [list(range(images))] * 2
    assert len({row["index"] for row in one}) == images // 2
    assert [{**row, "value": None} for row in one] == [{**row, "value": None} for row in two]
    assert all(float(a["value"]) == pytest.approx(float(b["value"]), abs=1e-6) for a, b in zip(one, two))
