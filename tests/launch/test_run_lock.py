"""Two commands in one run folder."""

import json
import os
import socket
import subprocess
import sys

import pytest

from labn.launch.run_lock import lock_path, locked


def test_a_second_holder_is_refused_with_the_first_ones_process(tmp_path):
    with locked(tmp_path / "run", "test"):
        assert lock_path(tmp_path / "run", "test").is_file()
        sentence = rf"run is in use: process {os.getpid()} runs test there since .*--run_dir"
        with pytest.raises(ValueError, match=sentence), locked(tmp_path / "run", "test"):
            pass
        with locked(tmp_path / "run", "fit"):  # another stage
            pass
    assert not list((tmp_path / "run").iterdir())
    with locked(tmp_path / "run", "test"):
        pass


def test_the_lock_goes_with_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), locked(tmp_path, "fit"):
        raise RuntimeError("boom")
    assert not lock_path(tmp_path, "fit").exists()


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("kind", ["ended", "number given again"])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, kind):
    process, started = (dead_process(), "1") if kind == "ended" else (os.getpid(), "another time")
    holder = {"host": socket.gethostname(), "process": process, "started": started}
    lock_path(tmp_path, "fit").write_text(json.dumps(holder))
    with locked(tmp_path, "fit"):
        assert json.loads(lock_path(tmp_path, "fit").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_host_is_named_with_what_to_do(tmp_path):
    path = lock_path(tmp_path, "fit")
    path.write_text(json.dumps({"host": "elsewhere", "process": 7, "started": "1"}))
    sentence = rf"process 7 on elsewhere runs fit .* If it has ended, remove {path}"
    with pytest.raises(ValueError, match=sentence), locked(tmp_path, "fit"):
        pass
    assert path.is_file()


def test_a_lock_that_is_just_being_written_counts_as_held(tmp_path):
    lock_path(tmp_path, "fit").write_text("")
    with pytest.raises(ValueError, match="another process runs fit there"), locked(tmp_path, "fit"):
        pass


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_further_ranks_leave_the_lock_to_the_first(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with locked(tmp_path, "fit"), locked(tmp_path, "fit"):
        assert not list(tmp_path.iterdir())


def test_a_requeued_job_takes_over_the_lock_of_its_killed_start_on_another_host(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    holder = {"host": "elsewhere", "process": 7, "started": "1", "slurm_job": "31", "slurm_restarts": "0"}
    lock_path(tmp_path, "fit").write_text(json.dumps(holder))
    with locked(tmp_path, "fit"):
        pass
    lock_path(tmp_path, "fit").write_text(json.dumps({**holder, "slurm_restarts": "1"}))
    with pytest.raises(ValueError, match="on elsewhere"), locked(tmp_path, "fit"):
        pass
