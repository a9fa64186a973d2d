"""The signal before the end of a SLURM job queues it again, once, from its first process."""

import os
import signal
import stat

import pytest

from labn.launch.slurm import job_id, requeue_on_signal, restarted


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job with a `scontrol` that writes down how it is called; the signal's handler is put back."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_PROCID", "0")
    before = signal.getsignal(signal.SIGUSR1)
    yield tmp_path / "calls"
    signal.signal(signal.SIGUSR1, before)


def test_the_first_process_requeues_the_job_once(job, capsys):
    requeue_on_signal()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert job.read_text() == "requeue 17\n"
    assert "SLURM job 17 is queued again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SLURM_PROCID", "RANK", "LOCAL_RANK"])
def test_other_processes_do_not_requeue_the_job(job, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    requeue_on_signal()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not job.exists()


def test_a_failed_requeue_prints_advice(job, monkeypatch, capsys):
    (job.parent / "scontrol").write_text("#!/bin/sh\necho 'Job may not be requeued' >&2\nexit 1\n")
    requeue_on_signal()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "`scontrol requeue 17` failed (Job may not be requeued); submit it again" in capsys.readouterr().err


def test_outside_slurm_no_signal_handler_is_installed(job, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    before = signal.getsignal(signal.SIGUSR1)
    requeue_on_signal()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_name_of_an_array_job_has_its_task(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_id() == "16_3"


@pytest.mark.parametrize(("count", "again"), [(None, False), ("", False), ("0", False), ("2", True)])
def test_a_requeued_job_is_detected_by_its_restart_count(job, monkeypatch, count, again):
    if count is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    assert restarted() == again
