"""Ranks end with the process that started them; this module imports nothing that takes time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

LAUNCHER = "LABN_LAUNCHER"
"""Environment variable with the process number of the command that may launch further ranks."""
_watching: set[int] = set()


def end_with_launcher() -> None:
    """Let a rank end within seconds of the death of the process that started it, in every phase of the command.

    Launchers end the other ranks when one of them fails. If the launcher itself is killed, its ranks wait for each
    other: half an hour before the process group exists, and as long as a collective's timeout after that. A rank that
    was started by hand under `nohup` shall outlive its shell, and is left alone.
    """
    launcher, parent = os.environ.get(LAUNCHER), os.getppid()
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or launcher == str(parent) or not _ignores_hangup()
    is_rank = any(name in os.environ for name in ("RANK", "LOCAL_RANK", "SLURM_STEP_ID")) and is_launched
    # A rank that Lightning starts from here recognises its launcher by this number.
    os.environ[LAUNCHER] = str(os.getpid())
    if os.getpid() not in _watching and (is_rank or multiprocessing.parent_process() is not None):
        _watching.add(os.getpid())
        # The launcher may have died between its fork and this line.
        is_orphan = parent == 1 and launcher not in (None, "1") and not Path(f"/proc/{launcher}").exists()
        threading.Thread(target=_watch, args=(-1 if is_orphan else parent,), name="launcher", daemon=True).start()


def _ignores_hangup() -> bool:
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def _watch(parent: int) -> None:
    # The system gives an orphan another parent. PR_SET_PDEATHSIG would signal the death of the thread that started
    # this process as well, and Linux alone has it.
    while os.getppid() == parent:
        time.sleep(1.0)
    # In a thread, because a pipe that nobody reads any more may block the line for ever.
    line = threading.Thread(target=_say_orphaned, daemon=True)
    line.start()
    line.join(2.0)
    # The main thread may never leave its collective. Files are whole at any moment, as after `kill -9`.
    os._exit(128 + signal.SIGTERM)


def _say_orphaned() -> None:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID", "")
    sentence = f"cli.py: rank {rank} ends, because the process that started it has ended; "
    with suppress(OSError):
        os.write(2, f"{sentence}the same command (fit: with --ckpt_path last) continues from here.\n".encode())


def _watch_if_rank(parent: int) -> None:
    time.sleep(1.0)  # multiprocessing notes the parent after the fork
    if multiprocessing.parent_process() is not None:
        _watch(parent)


def _after_fork() -> None:
    """Watch the parent of a process that multiprocessing has forked, such as a rank of the strategy `ddp_fork`."""
    threading.Thread(target=_watch_if_rank, args=(os.getppid(),), name="launcher", daemon=True).start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
