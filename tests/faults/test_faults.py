"""Bad days: each fault ends with the right sentence, leaves nothing half-written, and is gone when the command is given
again: the finished run equals one that nothing happened to, bit for bit. W&B out of reach is in `cli/test_wandb.py`,
kills of the command started in the ordinary way in `cli/test_resume.py`.
"""

import argparse
import os
import random
import shutil
import signal
import stat
import subprocess
import time

import cv2
import numpy as np
import pytest
from benchmarks import kills
from forked import ends_within
from run_contents import broken_files, contents, differences

from labn.results.training_logs import read_training

pytestmark = pytest.mark.slow


def copy_of(bench, tmp_path):
    """A finished run, free to be injured."""
    return shutil.copytree(bench.finished()[0], tmp_path / "run")


def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_one(bench, tmp_path):
    run_dir = copy_of(bench, tmp_path)
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    (process,) = bench.fit(run_dir, "--ckpt_path=last")
    assert f"{last} is damaged" in process.output
    assert "previous.ckpt, an epoch earlier" in process.output
    bench.equals_undisturbed(run_dir)


def test_truncated_maps_and_scores_are_computed_again(bench, tmp_path):
    run_dir = copy_of(bench, tmp_path)
    victims = [sorted((run_dir / "test" / kind).glob("labn.*"))[0] for kind in ("maps", "scores")]
    for path in victims:
        path.write_bytes(path.read_bytes()[:-30])
    (process,) = bench.test(run_dir)
    for path, what in zip(victims, ("maps", "scores")):
        assert f"{path} is damaged" in process.output
        assert f"its {what} are computed again" in process.output
    bench.equals_undisturbed(run_dir)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_log_row_lost_by_a_killed_process_is_in_the_curves(bench, tmp_path, epoch):
    run_dir = tmp_path / "run"
    (process,) = bench.fit(run_dir, environment={"LABN_TEST_UNLOGGED": str(epoch)}, check=False)
    assert process.poll() == -signal.SIGKILL
    assert epoch not in read_training(run_dir).get("train/loss", {})
    bench.fit(run_dir, "--ckpt_path=last")
    assert list(read_training(run_dir)["train/loss"]) == [0, 1, 2]
    bench.test(run_dir)
    bench.equals_undisturbed(run_dir)


def test_a_loss_that_is_nan_raises_before_a_checkpoint_is_saved(bench, tmp_path):
    run_dir = tmp_path / "run"
    (process,) = bench.fit(run_dir, environment={"LABN_TEST_NAN": "6"}, check=False)
    assert process.poll() == 1
    assert "The train loss is nan in epoch 1, step 6, samples train_" in process.output
    assert broken_files(run_dir) == []
    bench.fit(run_dir, "--ckpt_path=last")
    bench.test(run_dir)
    bench.equals_undisturbed(run_dir)


def test_exhausted_memory_on_one_rank_ends_both_and_names_the_rank(bench, tmp_path):
    run_dir = shutil.copytree(bench.finished(ranks=2)[0], tmp_path / "run")
    shutil.rmtree(run_dir / "test")
    ranks = bench.test(run_dir, ranks=2, environment={"LABN_TEST_HUNGRY": "1"}, check=False)
    assert [rank.poll() for rank in ranks] == [1, 1]
    assert "Rank 1 is out of memory" in ranks[1].output
    assert "lower data.init_args.batch_size" in ranks[1].output
    assert "Rank 0 has lost another process, whose own message says why" in ranks[0].output
    assert broken_files(run_dir) == []
    assert not (run_dir / "test" / "scores.csv").exists()
    bench.test(run_dir, ranks=2)
    bench.equals_undisturbed(run_dir, ranks=2)


def test_a_run_folder_that_is_removed_meanwhile_ends_the_command_with_a_sentence(bench, tmp_path):
    run_dir = copy_of(bench, tmp_path)
    shutil.rmtree(run_dir / "test")
    (process,) = bench.test(run_dir, environment={"LABN_TEST_REMOVE": str(run_dir)}, check=False)
    assert process.poll() == 1
    assert f"{run_dir / 'test' / 'identity.json'} has been removed or moved while this command ran" in process.output
    removed = {"LABN_TEST_REMOVE": str(run_dir), "LABN_TEST_AT": "6"}
    (process,) = bench.fit(run_dir, environment=removed, check=False)
    assert process.poll() == 1
    assert f"{run_dir}" in process.output.splitlines()[-1]
    assert "has been removed or moved while this command ran" in process.output.splitlines()[-1]
    bench.fit(run_dir)
    bench.test(run_dir)
    bench.equals_undisturbed(run_dir)


def test_a_closed_terminal_ctrl_c_and_sigterm_end_with_a_sentence_and_the_run_goes_on(bench, tmp_path):
    run_dir = tmp_path / "run"
    signals = {"LABN_TEST_AT": "6", "LABN_TEST_SIGNALS": "SIGHUP"}
    (process,) = bench.fit(run_dir, environment=signals, check=False)
    assert process.poll() == 128 + signal.SIGTERM
    assert "Terminated; the same command (fit: with --ckpt_path last) resumes from here." in process.output
    bench.fit(run_dir, "--ckpt_path=last")
    for name, said in (("SIGINT", "Interrupted"), ("SIGTERM", "Terminated")):
        (process,) = bench.test(run_dir, environment={"LABN_TEST_EXPLAIN": name}, check=False)
        assert process.poll() == 128 + signal.Signals[name]
        assert f"{said}; the same command" in process.output
        assert "goes on after the signal" not in process.output
    assert not list(run_dir.glob(".*"))
    bench.test(run_dir)
    bench.equals_undisturbed(run_dir)


def test_a_rank_whose_launcher_dies_while_it_waits_for_the_others_ends(bench, tmp_path):
    words = ["fit", "--config=tests/faults/small.yaml", f"--run_dir={tmp_path / 'run'}"]
    (rank,) = bench.server.start(*words, ranks=2, only=[1])
    while "Initializing distributed" not in rank.output:
        assert rank.poll() is None, rank.output
        time.sleep(0.02)
    os.kill(rank.parent, signal.SIGKILL)
    assert ends_within(rank.pid, 30)
    assert "rank 1 ends, because the process that started it has ended" in rank.output


@pytest.fixture
def slurm(tmp_path):
    """Environment of a job of one task, with a `scontrol` that writes down how it is called."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    ids = {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}
    job = {f"SLURM_{name}": value for name, value in {**ids, "JOB_NAME": "train", "NTASKS_PER_NODE": "1"}.items()}
    return {**job, "PATH": f"{tool.parent}:{os.environ['PATH']}"}


def test_a_preempted_slurm_job_is_requeued_and_resumes(bench, tmp_path, slurm):
    run_dir = tmp_path / "run"
    signals = {"LABN_TEST_AT": "6", "LABN_TEST_SIGNALS": "SIGUSR1 SIGTERM"}
    (process,) = bench.fit(run_dir, environment={**slurm, **signals}, check=False)
    assert process.poll() == 128 + signal.SIGTERM
    assert "SLURM job 17 is queued again; it will go on from the last whole epoch" in process.output
    assert "Terminated; the same command" in process.output
    assert (tmp_path / "calls").read_text() == "requeue 17\n"
    assert not list(run_dir.glob("hpc_ckpt*"))
    (process,) = bench.fit(run_dir, environment={**slurm, "SLURM_RESTART_COUNT": "1"})
    assert f"fit resumes from the last checkpoint in {run_dir}" in process.output
    bench.test(run_dir, environment={**slurm, "SLURM_RESTART_COUNT": "1"})
    bench.equals_undisturbed(run_dir)


@pytest.fixture
def pictures(tmp_path):
    """Ten test pictures, and some to train on, in files."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 5)):
        for name in ("a", "b"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                cv2.imwrite(str(folder / f"{number}.png"), noise.integers(0, 255, (48, 48, 3), dtype=np.uint8))
    return tmp_path / "pictures"


def test_a_vanished_picture_raises_an_error_that_names_it_and_results_stay(bench, tmp_path, pictures):
    data = tmp_path / "data.yaml"
    options = {"root": str(pictures), "image_size": 48, "batch_size": 4, "mean": [0.5] * 3, "std": [0.25] * 3}
    metrics = "{class_path: callbacks.EvaluationCallback, init_args: {metrics: [pid16]}}"
    explainers = "{class_path: callbacks.ExplanationCallback, init_args: {explainers: {labn: }}}"
    callbacks = f"[{{class_path: callbacks.BestCheckpoint}}, {explainers}, {metrics}, callbacks.ReportCallback]"
    data.write_text(
        f"data: {{class_path: faulty.Vanishing, init_args: {options}}}\ntrainer: {{callbacks: {callbacks}}}"
    )
    for run_dir in ("whole", "cut"):
        bench.fit(tmp_path / run_dir / "run", "--config", str(data), "--trainer.max_epochs=1")
    bench.test(tmp_path / "whole" / "run", "--config", str(data))
    run_dir, gone = tmp_path / "cut" / "run", tmp_path / "gone.png"
    (process,) = bench.test(run_dir, "--config", str(data), environment={"LABN_TEST_VANISH": str(gone)}, check=False)
    assert process.poll() == 1
    lost = pictures / "test" / "b" / "4.png"
    assert f"Image {lost} cannot be read (No such file or directory); put it back" in process.output
    assert broken_files(run_dir) == []
    gone.rename(lost)
    (process,) = bench.test(run_dir, "--config", str(data))
    assert "Read the scores of" in process.output
    assert differences(contents(run_dir), contents(tmp_path / "whole" / "run")) == []


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, `run` on it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "labn-test", place], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk, left):
    """Leave `left` bytes."""
    (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - left))
    return disk / "filler"


def test_a_full_disk_raises_one_sentence_and_files_stay_complete(bench, disk):
    run_dir = disk / "run"
    for step in (bench.fit, bench.test):
        filler = fill(disk, 100_000)
        (process,) = step(run_dir, check=False)
        assert process.poll() == 1
        told = process.output.splitlines()[-1]
        assert str(run_dir) in told
        assert "cannot be written: No space left on device; free some space" in told
        assert broken_files(run_dir) == []
        filler.unlink()
        step(run_dir)
    bench.equals_undisturbed(run_dir)


def test_a_read_only_folder_raises_at_once(bench, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for step in (bench.fit, bench.test):
        (process,) = step(disk / "run", check=False)
        assert process.poll() == 1
        told = process.output.splitlines()[-1]
        assert f"--run_dir {disk / 'run'} cannot be written: Read-only file system; make the folder writable" in told


def test_a_run_that_is_killed_and_two_commands_in_one_folder_end_with_the_same_results(bench, tmp_path, monkeypatch):
    """The short form of `tests/benchmarks/kills.py`."""
    monkeypatch.setattr(kills, "CONFIG", ["--config", "tests/faults/faulty.yaml"])
    tally, finished = kills.Tally(), bench.finished()
    # Kills come within a tenth of a second of a phase's first file, so that they meet a command at work.
    plan = kills.Plan(random.Random(1), {1: dict.fromkeys(kills.FIRST, 0.1)})
    killed, pair = tmp_path / "killed" / "run", tmp_path / "pair" / "run"
    kills.history(bench.server, killed, 1, argparse.Namespace(kills=2, patience=1), plan, tally)
    kills.check(killed, finished[1], tally)
    kills.pair(bench.server, pair, finished[0], 1.0, plan, tally)
    kills.check(pair, finished[1], tally)
    assert tally.faults == []
    assert sum(tally.kills.values()) == 2
    assert sum(tally.pairs.values()) == 1
