"""Two commands in one run folder."""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading

import pytest

from labn.io.atomic import remove_leftovers
from labn.launch import run_lock
from labn.launch.run_lock import check_held, clean_run_folder, lock_path, locked


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


def holder_of(process):
    return {"host": socket.gethostname(), "process": process, "started": run_lock._started(process)}


def test_a_lock_that_is_just_being_written_counts_as_held(tmp_path):
    path = lock_path(tmp_path, "fit")
    path.write_text("")
    writer = threading.Timer(0.1, lambda: path.write_text(json.dumps(holder_of(os.getppid()))))
    writer.start()
    with pytest.raises(ValueError, match=f"process {os.getppid()} runs fit there"), locked(tmp_path, "fit"):
        pass
    writer.join()


def test_a_lock_whose_process_was_killed_before_it_wrote_its_name_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LONGEST_START", 0.1)
    lock_path(tmp_path, "fit").write_text("")
    with locked(tmp_path, "fit"):
        assert json.loads(lock_path(tmp_path, "fit").read_text())["process"] == os.getpid()


def test_a_process_that_only_its_parent_remembers_holds_nothing(tmp_path):
    zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock_path(tmp_path, "fit").write_text(json.dumps(holder_of(zombie.pid)))
    with pytest.raises(ValueError, match=f"process {zombie.pid}"), locked(tmp_path, "fit"):
        pass
    zombie.kill()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path, "fit"):
        pass
    zombie.communicate()


def test_a_lock_removed_by_hand_is_taken_again_and_a_stolen_one_ends_the_command(tmp_path):
    with locked(tmp_path, "fit"):
        check_held(tmp_path, "fit")
        lock_path(tmp_path, "fit").unlink()
        check_held(tmp_path, "fit")
        lock_path(tmp_path, "fit").write_text(json.dumps(holder_of(os.getppid())))
        with pytest.raises(ValueError, match=f"process {os.getppid()} runs fit there"):
            check_held(tmp_path, "fit")


def _check(run_dir):
    check_held(run_dir, "fit")
    lock_path(run_dir, "fit").write_text(json.dumps(holder_of(1)))
    with contextlib.suppress(ValueError):
        check_held(run_dir, "fit")
        os._exit(3)


def test_a_rank_that_the_holder_has_forked_works_under_its_lock(tmp_path):
    with locked(tmp_path, "fit"):
        rank = multiprocessing.get_context("fork").Process(target=_check, args=(tmp_path,))
        rank.start()
        rank.join()
    assert rank.exitcode == 0


LEFT = [
    ".fit.yaml",
    "checkpoints/.last.ckpt",
    "test/maps/.a.safetensors",
    "val/epoch=001/.scores.csv",
    "logs/fit/.m.csv",
]


def leave(run_dir, process):
    paths = [run_dir / f"{name}.{process}.tmp" for name in [*LEFT, "test.old-1/scores/.b.npz"]]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    return paths


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_next_command_removes_what_killed_ones_left(tmp_path, command):
    gone = [*leave(tmp_path, dead_process()), *leave(tmp_path, os.getpid()), *leave(tmp_path, 10**30)]
    kept = [tmp_path / "mine/.a.1.tmp", tmp_path / "checkpoints/.hidden.tmp", tmp_path / "test/a.1.tmp"]
    kept += leave(tmp_path, os.getppid())
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of somebody else")
    stale = [lock_path(tmp_path, name) for name in ("fit", "validate", "test") if name != command]
    for path in stale:
        path.write_text(json.dumps({"host": socket.gethostname(), "process": dead_process(), "started": "1"}))
    clean_run_folder(tmp_path, command)
    assert not any(path.exists() for path in [*gone, *stale])
    assert all(path.exists() for path in kept)
    for path in kept:  # hours later their writer is another process of that number
        os.utime(path, (0, 0))
    clean_run_folder(tmp_path, command)
    assert [path.exists() for path in kept] == [True] * 3 + [False] * 6


def test_a_folder_that_a_killed_process_left_is_removed_too(tmp_path):
    half = tmp_path / "test" / f".explained.{dead_process()}.tmp"
    for content in (half / "overlays" / "a.png", half / f".sheet.png.{dead_process()}.tmp"):
        content.parent.mkdir(parents=True, exist_ok=True)
        content.write_text("half")
    clean_run_folder(tmp_path, "fit")
    assert not half.exists()
    half.mkdir()
    remove_leftovers(tmp_path / "test")
    assert not half.exists()


def test_leftovers_stay_while_another_command_runs(tmp_path):
    paths = leave(tmp_path, dead_process())
    for holder in (holder_of(os.getppid()), {"host": "elsewhere", "process": 7, "started": "1"}):
        lock_path(tmp_path, "fit").write_text(json.dumps(holder))
        clean_run_folder(tmp_path, "test")
        assert all(path.exists() for path in paths)


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
