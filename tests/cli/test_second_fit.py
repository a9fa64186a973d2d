"""A fresh fit moves the files of an earlier fit aside; a resumed fit leaves them in place."""

import csv

import pytest
import torch
from command_line import TINY, call_main, run

from labn.launch.archive_fit import archive_fit, has_fit
from labn.results.training_logs import read_training

CALLBACKS = (
    '[{"class_path": "callbacks.BestCheckpoint"}, {"class_path": "callbacks.LastCheckpoint"}, '
    '{"class_path": "callbacks.ExplanationCallback", "init_args": {"explainers": {"random": null}, "val_images": 2}}]'
)
QUICK = ["--config", "configs/quickstart.yaml", *TINY, f"--trainer.callbacks={CALLBACKS}"]


def fit(run_dir, epochs, *more):
    call_main(["fit", *QUICK, f"--run_dir={run_dir}", f"--trainer.max_epochs={epochs}", *more])


def epochs(run_dir):
    return list(read_training(run_dir)["val/loss"])


def epoch(path):
    return torch.load(path, weights_only=False)["epoch"]


@pytest.mark.slow
def test_a_fresh_fit_keeps_the_earlier_one_apart_and_a_resumed_one_goes_on(tmp_path, monkeypatch, request, caplog):
    monkeypatch.chdir(request.config.rootpath)
    old, saved = tmp_path / "fit.old-1", tmp_path / "checkpoints"
    fit(tmp_path, 2)
    (tmp_path / "test").mkdir()
    assert (epochs(tmp_path), old.exists(), "starts afresh" in caplog.text) == ([0, 1], False, False)
    with caplog.at_level("INFO"):
        fit(tmp_path, 1)
    assert f"are now in {old}; to resume that fit: --ckpt_path {old}/checkpoints/last.ckpt" in caplog.text
    # Nothing of the first is left beside the second, and the first is whole.
    assert (epochs(tmp_path), epochs(old)) == ([0], [0, 1])
    assert {path.name for path in saved.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (epoch(saved / "last.ckpt"), epoch(old / "checkpoints" / "last.ckpt")) == (0, 1)
    assert [path.name for path in sorted((tmp_path / "val").iterdir())] == ["epoch=000"]
    assert [path.name for path in sorted((old / "val").iterdir())] == ["epoch=000", "epoch=001"]
    assert {path.name for path in old.iterdir()} == {"checkpoints", "logs", "val", "fit.yaml"}
    assert (tmp_path / "test").is_dir()
    fit(tmp_path, 2, "--ckpt_path=last")
    assert (epochs(tmp_path), epoch(saved / "last.ckpt")) == ([0, 1], 1)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"fit", "fit-1"}
    fit(tmp_path, 1, "--trainer.fast_dev_run=true")
    assert not (tmp_path / "fit.old-2").exists()


def test_a_fit_that_cannot_begin_moves_nothing(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    (tmp_path / "logs" / "fit").mkdir(parents=True)
    log = tmp_path / "logs" / "fit" / "metrics.csv"
    log.write_text("epoch,val/loss\n0,1.0\n")
    for wrong, error in (("--ckpt_path=last", FileNotFoundError), ("--data.init_args.image_size=-1", Exception)):
        with pytest.raises(error):
            fit(tmp_path, 1, wrong)
    assert log.exists()
    assert not list(tmp_path.glob("fit.old-*"))


def test_only_what_a_fit_has_left_is_moved(tmp_path):
    (tmp_path / "logs" / "test").mkdir(parents=True)
    (tmp_path / "logs" / "test" / "metrics.csv").write_text("epoch,test/loss\n0,1\n")
    (tmp_path / "checkpoints").mkdir()
    assert not has_fit(tmp_path)
    assert archive_fit(tmp_path) is None
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / "last.ckpt").write_text(str(number))
        aside = archive_fit(tmp_path)
        assert aside == tmp_path / f"fit.old-{number}"
        assert (aside / "checkpoints" / "last.ckpt").read_text() == str(number)
    assert (tmp_path / "logs" / "test" / "metrics.csv").exists()


@pytest.mark.slow
def test_processes_that_are_started_later_do_not_move_what_the_first_has_begun(tmp_path):
    two = ["--config", "configs/shared/ddp_cpu.yaml", "--trainer.devices=2", f"--trainer.callbacks={CALLBACKS}"]
    for _ in range(2):
        run("fit", *two, "--trainer.max_epochs=1", run_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("fit.old-*")] == ["fit.old-1"]
    for folder in (tmp_path, tmp_path / "fit.old-1"):
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        with (folder / "logs" / "fit" / "metrics.csv").open(newline="") as file:
            assert any(row["val/loss"] for row in csv.DictReader(file))
