"""The same command on one and on several processes writes the same results, also with a rank that has no sample."""

import csv

import pytest
from command_line import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a checkpoint, trained with every callback on; one of three processes has no validation data."""
    folder = tmp_path_factory.mktemp("trained")
    run("fit", "--data.init_args.n_val=2", run_dir=folder, ranks=3)
    return folder


def rows(folder, name):
    with open(folder / "test" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_fit_leaves_checkpoints_and_validation_results(trained):
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    for epoch in (0, 1):
        with open(trained / "val" / f"epoch={epoch:03d}" / "predictions.csv", newline="") as file:
            assert [row["index"] for row in csv.DictReader(file)] == ["0", "1"]


def last_logged(folder, command):
    """Name -> its last value in the log of a command; what it cost depends on the machine."""
    with open(folder / "logs" / command / "metrics.csv", newline="") as file:
        values = {name: text for row in csv.DictReader(file) for name, text in row.items() if text}
    return {name: float(text) for name, text in values.items() if name.split("/")[0] in ("val", "gate")}


def test_fit_on_several_processes_logs_the_validation_of_one(trained):
    run("validate", "--ckpt_path=last", "--data.init_args.n_val=2", run_dir=trained)
    fitted, validated = (last_logged(trained, command) for command in ("fit", "validate"))
    shared = fitted.keys() & validated.keys()
    assert shared >= {"val/loss", "val/accuracy", "val/tss", "gate/val_open", "val/labn/pid16", "val/labn/mass"}
    assert {name for name in fitted if "train" not in name} <= shared
    assert {n: fitted[n] for n in shared} == pytest.approx({n: validated[n] for n in shared}, abs=1e-6)


@pytest.mark.parametrize(("images", "ranks"), [(13, 2), (2, 3)])
def test_processes_write_the_rows_of_one(trained, tmp_path, images, ranks):
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}"
    size = f"--data.init_args.n_test={images}"
    run("test", checkpoint, size, run_dir=tmp_path / "one")
    run("test", checkpoint, size, run_dir=tmp_path / "many", ranks=ranks)
    one, many = (rows(tmp_path / name, "scores.csv") for name in ("one", "many"))
    seen = [rows(tmp_path / name, "predictions.csv") for name in ("one", "many")]
    assert [[int(row["index"]) for row in each] for each in seen] == [list(range(images))] * 2
    assert len({row["index"] for row in one}) == images // 2
    assert [{**row, "value": None} for row in one] == [{**row, "value": None} for row in many]
    assert all(float(a["value"]) == pytest.approx(float(b["value"]), abs=1e-6) for a, b in zip(one, many))
