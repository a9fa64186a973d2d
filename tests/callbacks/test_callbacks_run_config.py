"""The watch over the files of the run folder that a command relies on."""

import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.logging.run_config import RunConfigCallback
from labn.launch.run_lock import locked


def test_a_resume_with_other_settings_names_them(tmp_path):
    path = tmp_path / "fit.yaml"
    first = {"data": {"init_args": {"batch_size": 4, "num_workers": 0}}, "trainer": {"max_epochs": 2}, "gone": 1}
    path.write_text(yaml.safe_dump(first))
    callback = RunConfigCallback(parser=SimpleNamespace(dump=lambda config, **_: yaml.safe_dump(config)), config=None)
    again = {"data": {"init_args": {"batch_size": 4, "num_workers": 9}}, "trainer": {"max_epochs": 9}, "new": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback._warn_of_changes(path, again)
        callback._warn_of_changes(tmp_path / "none.yaml", again)
    again["data"]["init_args"]["batch_size"] = 8
    with pytest.warns(UserWarning, match=r"began with: data.init_args.batch_size 8 \(was 4\); its epochs have both"):
        callback._warn_of_changes(path, again)


@pytest.mark.parametrize(("command", "lost"), [("fit", "fit.yaml"), ("fit", "best.ckpt"), ("test", "test.yaml")])
def test_files_that_are_removed_meanwhile_are_named(tmp_path, command, lost):
    paths = {name: tmp_path / name for name in (f"{command}.yaml", "best.ckpt")}
    for path in paths.values():
        path.touch()
    callback = RunConfigCallback(parser=None, config=None)
    callback._needed = (paths[f"{command}.yaml"],)
    best = SimpleNamespace(best_model_path=str(paths["best.ckpt"]))
    trainer = SimpleNamespace(
        default_root_dir=str(tmp_path), state=SimpleNamespace(fn=command), checkpoint_callbacks=[best]
    )
    with locked(tmp_path, command):
        callback.check_run_folder(trainer)
        paths[lost].unlink()
        with pytest.raises(OSError, match=f"{lost} has been removed or moved while this command ran"):
            callback.check_run_folder(trainer)


def test_the_saved_configuration_has_no_password(tmp_path):
    config = Namespace(
        trainer=Namespace(default_root_dir=None, logger={"tracking_uri": "http://me:secret@host:5000/a"})
    )
    parser = SimpleNamespace(dump=lambda config, **_: yaml.safe_dump(config.as_dict()))
    callback = RunConfigCallback(parser=parser, config=config)
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    trainer.state.fn = TrainerFn.TESTING
    callback.setup(trainer, pl.LightningModule(), "test")
    saved = yaml.safe_load((tmp_path / "test.yaml").read_text())
    assert saved["trainer"]["logger"] == {"tracking_uri": "http://host:5000/a"}
