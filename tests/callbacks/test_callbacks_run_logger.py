"""The CSV log keeps whole rows through new columns, failures and kills."""

import os
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from callbacks import RunLogger
from callbacks.logging.csv_logger import RowWriter, named
from labn.results.training_logs import read_training


def log(logger):
    logger.log_hyperparams({"lr": 0.1})
    for epoch in range(3):
        logger.log_metrics({"epoch": epoch, "train/loss": 1.0 / (epoch + 1)}, step=epoch)
        logger.log_metrics({"epoch": epoch, "val/loss": 0.1 + epoch}, step=epoch)
        logger.save()


def test_metrics_csv_equals_that_of_lightning(tmp_path):
    for kind in (RunLogger, CSVLogger):
        log(kind(save_dir=tmp_path, name=kind.__name__, version="fit"))
    for file in ("metrics.csv", "hparams.yaml"):
        mine, theirs = ((tmp_path / kind.__name__ / "fit" / file).read_text() for kind in (RunLogger, CSVLogger))
        assert mine == theirs.replace("\r\n", "\n")


def test_a_new_column_keeps_all_rows_of_the_file(tmp_path, monkeypatch):
    logger = RunLogger(save_dir=tmp_path, name="logs", version="fit")
    log(logger)
    before = (tmp_path / "logs" / "fit" / "metrics.csv").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    logger.log_metrics({"epoch": 3, "val/accuracy": 0.5}, step=3)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    assert (tmp_path / "logs" / "fit" / "metrics.csv").read_bytes() == before


def test_a_folder_of_a_failed_command_is_taken_in_silence_and_replaced_rows_are_named(tmp_path, recwarn):
    """A command that fails before its first row leaves its settings alone."""
    (tmp_path / "hparams.yaml").write_text("lr: 0.1")
    RowWriter(log_dir=str(tmp_path))
    assert not recwarn
    path = tmp_path / "metrics.csv"
    path.write_text("step\n0\n")
    RowWriter(log_dir=str(tmp_path))
    assert [str(warning.message) for warning in recwarn] == [f"{path} is of an earlier command; this one replaces it."]
    assert not path.exists()


def test_rows_that_are_removed_meanwhile_raise_an_error_that_names_the_file(tmp_path):
    logger = RunLogger(save_dir=tmp_path, name="logs", version="fit")
    log(logger)
    (tmp_path / "logs" / "fit" / "metrics.csv").unlink()
    for name in ("val/loss", "val/new"):
        logger.log_metrics({"epoch": 3, name: 0.5}, step=3)
        with pytest.raises(OSError, match=r"metrics\.csv has been removed or moved while this command ran"):
            logger.save()
    assert list((tmp_path / "logs" / "fit").iterdir()) == [tmp_path / "logs" / "fit" / "hparams.yaml"]


def test_an_incomplete_row_is_left_out_of_the_training_curves(tmp_path):
    log(RunLogger(save_dir=tmp_path, name="logs", version="fit"))
    path = tmp_path / "logs" / "fit" / "metrics.csv"
    whole = read_training(tmp_path)
    assert whole["val/loss"] == {0: 0.1, 1: 1.1, 2: 2.1}
    text = path.read_text()
    assert text.endswith("2.1\n")
    for end in range(len(text) - 4, len(text)):
        path.write_text(text[:end])
        assert read_training(tmp_path)["val/loss"] == {0: 0.1, 1: 1.1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_error_names_the_file():
    with (
        pytest.raises(OSError, match=r"metrics\.csv cannot be written: No space left on device; free some space"),
        named(Path("logs/fit/metrics.csv")),
        open("/dev/full", "w") as file,
    ):
        file.write("1")
