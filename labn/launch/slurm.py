"""Preemption under SLURM: ask for the job to be queued again, and know that this is such a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def restarted() -> bool:
    """Whether SLURM has queued this job again before (`SLURM_RESTART_COUNT`)."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def requeue_on_signal(number: int = signal.SIGUSR1) -> None:
    """Under SLURM, let the signal that announces the end (`#SBATCH --signal=SIGUSR1@90`) queue the job again.

    The first process of the job asks for it, once; the others ignore the signal. Nothing is saved then: the next run
    starts from the last whole epoch, so that it ends with the very weights of an undisturbed one, which a checkpoint
    from the middle of an epoch, let alone of a step, would not give. Call it in the main thread.
    """
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(number, _Requeue())


class _Requeue:
    """The signal's handler; workers that inherit it are not the process that installed it."""

    def __init__(self) -> None:
        first = all(os.environ.get(name, "0") == "0" for name in RANKS)
        self.owner = os.getpid() if first else None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            return
        self.owner = None
        job = job_id()
        try:
            reason = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True).stdout
            said = f"SLURM job {job} is queued again; it will go on from the last whole epoch. {reason}"
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            said = f"`scontrol requeue {job}` failed ({reason.strip()}); submit it again with --ckpt_path last."
        print(said.strip(), file=sys.stderr, flush=True)


def job_id() -> str:
    """What `scontrol` calls this job: its number, in an array with the task's."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
