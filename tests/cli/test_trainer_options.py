"""Options of Lightning's trainer that the project meets with code of its own."""

import pytest
import yaml
from command_line import TINY, call_main

SAVED = '[{"class_path": "callbacks.LastCheckpoint"}, {"class_path": "callbacks.RunProfile"}]'
FIT = ["fit", "--config", "configs/quickstart.yaml", *TINY, f"--trainer.callbacks={SAVED}", "--trainer.max_epochs=1"]


@pytest.fixture
def root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.slow
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("precision", "epochs"), [("bf16-true", 1), ("16-true", 0), ("64-true", 1)])
def test_a_network_of_another_type_is_profiled_and_trained(tmp_path, caplog, precision, epochs):
    """In half precision Adam divides by a zero, which has its own sentence: that network is looked at only."""
    options = [f"--trainer.precision={precision}", "--trainer.limit_train_batches=1", f"--trainer.max_epochs={epochs}"]
    with caplog.at_level("INFO"):
        call_main([*FIT, f"--run_dir={tmp_path}", *options])
    assert "parameters (244,562 trainable); per image" in caplog.text
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file() == (epochs == 1)


@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_overfitting_a_batch_works(tmp_path):
    call_main([*FIT, f"--run_dir={tmp_path / 'a'}", "--trainer.overfit_batches=1"])
    resolved = tmp_path / "a" / "fit.yaml"
    assert yaml.safe_load(resolved.read_text())["trainer"]["default_root_dir"] is None
    again = ["fit", "--config", str(resolved), f"--run_dir={tmp_path / 'b'}", "--ckpt_path=null"]
    call_main(again)
    assert (tmp_path / "b" / "checkpoints" / "last.ckpt").is_file()
