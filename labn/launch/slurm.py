"""Preemption under SLURM: requeueing the job, and detecting a requeued job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def is_first_process() -> bool:
    """Whether this is the first process of a run, as far as its launcher's environment says."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def restarted() -> bool:
    """Whether SLURM has requeued this job (`SLURM_RESTART_COUNT` above 0)."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def requeue_on_signal(number: int = signal.SIGUSR1) -> None:
    """Under SLURM, requeue the job at the signal that announces its end (`#SBATCH --signal=SIGUSR1@90`).

    The first process of the job requeues it, once; the others ignore the signal. Must be called in the main thread.
    """
    # No checkpoint is saved at the signal: the next run resumes from the last complete epoch and ends with exactly the
    # weights of an uninterrupted run, which a checkpoint from the middle of an epoch would not give.
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(number, _Requeue())


class _Requeue:
    """The signal handler. Data loader workers inherit it by fork and do nothing, as they did not install it."""

    def __init__(self) -> None:
        self.owner = os.getpid() if is_first_process() else None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            return
        self.owner = None
        job = job_id()
        try:
            reason = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True).stdout
            message = f"SLURM job {job} is queued again; it will go on from the last whole epoch. {reason}"
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            message = f"`scontrol requeue {job}` failed ({reason.strip()}); submit it again with --ckpt_path last."
        print(message.strip(), file=sys.stderr, flush=True)


def job_id() -> str:
    """The job's name for `scontrol`: `<job>`, or `<array>_<task>` in an array job."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
