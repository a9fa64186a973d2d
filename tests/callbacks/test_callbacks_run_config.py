"""The watch over the files of the run folder that a command relies on."""

from types import SimpleNamespace

import pytest

from callbacks.logging.run_config import RunConfigCallback
from labn.launch.run_lock import locked


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
