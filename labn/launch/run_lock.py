"""One command per stage of a run folder: a second `fit` or `test` in the same folder ends at once with a sentence.

The lock is a file that is created exclusively, which local and network file systems do atomically; neither `flock` nor
hard links are needed. It names host, process and start time, so that the lock of a killed process is recognised.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from labn.errors import InputError
from labn.io.atomic import LEFTOVERS, remove_leftover, write_error
from labn.launch.slurm import is_first_process

COMMANDS = ("fit", "validate", "test")

FOLDERS = re.compile(r"checkpoints|logs|((fit|val|test)(\.old-\d+)?)")
"""Names of the folders that these commands write, in a run folder."""

LONGEST_WRITE = 3600.0
"""Seconds after which a temporary file that nobody has written to is a leftover."""

LONGEST_START = 5.0
"""Seconds after which a lock without content is that of a process that was killed while it wrote the lock."""


def lock_path(run_dir: Path, command: str) -> Path:
    """The lock file of a command in a run folder; `compare` and `explain` ask for none."""
    return run_dir / f".{command}.lock"


@contextmanager
def locked(run_dir: Path, command: str) -> Iterator[None]:
    """Hold the lock of a command on its run folder; the first process of a run holds it for all ranks.

    Args:
        run_dir: the run folder, which is created.
        command: fit, validate or test.

    Raises:
        InputError: another living process holds the lock, or one on another host whose life cannot be seen from here.
        FileError: the folder cannot be written.
    """
    if not is_first_process():
        yield
        return
    path = lock_path(run_dir, command)
    _take(path, command)
    try:
        yield
    finally:
        # Only the own lock: after a wrong "remove it" by hand another process may hold one by now.
        if _holder(path) == _myself():
            with suppress(FileNotFoundError):
                path.unlink()


def check_held(run_dir: Path, command: str) -> None:
    """Check that this process still holds its lock; a lock that was removed by hand is taken again.

    Raises:
        InputError: another process holds the lock by now, so that both write to the folder.
        FileError: the folder cannot be written.
    """
    path = lock_path(run_dir, command)
    holder, parent = _holder(path), multiprocessing.parent_process()
    # With `ddp_spawn` and `ddp_fork` the first rank is a child of the process that holds the lock.
    is_parents = holder is not None and parent is not None and holder.get("process") == parent.pid
    if holder != _myself() and not is_parents:
        _take(path, command)


def clean_run_folder(run_dir: Path, command: str) -> None:
    """Delete what killed commands left in a run folder: temporary files, and locks of processes that have ended.

    The caller holds the lock of `command`. Nothing is deleted while another command runs in the folder, and no file
    that belongs to a process which has just started.
    """
    running = [_may_run(lock_path(run_dir, other)) for other in COMMANDS if other != command]
    if any(running):
        return
    now = time.time()
    for path in _temporary_files(run_dir):
        number = int(path.name.split(".")[-2])
        with suppress(FileNotFoundError):
            if number == os.getpid() or not _is_alive(number) or now - path.stat().st_mtime > LONGEST_WRITE:
                remove_leftover(path)


def _may_run(path: Path) -> bool:
    """Whether a lock is held; the lock of an ended process is removed."""
    holder = _holder(path)
    if holder is not None and _is_stale(holder):
        _remove_stale(path, holder)
    return path.exists()


def _temporary_files(run_dir: Path) -> list[Path]:
    """Temporary files of the run folder, without those of other run folders inside it."""
    own = [path for path in run_dir.iterdir() if FOLDERS.fullmatch(path.name) and path.is_dir()]
    files = itertools.chain(run_dir.glob(LEFTOVERS), *(folder.rglob(LEFTOVERS) for folder in own))
    return [path for path in files if re.fullmatch(r"\..+\.\d+\.tmp", path.name)]


def _take(path: Path, command: str) -> None:
    for _ in range(3):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                json.dump(_myself(), file)
            return
        except FileExistsError:
            holder = _waited_for(path)
            if holder is not None and not _is_stale(holder):
                raise InputError(_sentence(path, command, holder)) from None
            _remove_stale(path, holder)
        except OSError as error:
            raise write_error(path, error) from error
    raise InputError(_sentence(path, command, _holder(path)))


def _waited_for(path: Path) -> dict[str, Any] | None:
    """The holder of a lock that another process may just be writing; None if it writes nothing."""
    end = time.monotonic() + LONGEST_START
    while (holder := _holder(path)) is None and path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return holder


def _remove_stale(path: Path, holder: dict[str, Any] | None) -> None:
    """Remove the lock of a dead process, unless another process has replaced it in the meantime."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _holder(aside) != holder and not path.exists():
            aside.rename(path)
        aside.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _holder(path: Path) -> dict[str, Any] | None:
    """The process that a lock file names; None while the file is being written, or is damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return None


def _started(process: int) -> str:
    """Start time of a process as the system counts it, which tells a process from a later one of the same number."""
    return (_status(process)[19:20] or [""])[0]


def _status(process: int) -> list[str]:
    """The fields of `/proc/<process>/stat` behind the name, state first; empty where the system has no such file."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def _is_stale(holder: dict[str, Any]) -> bool:
    """Whether the holder has ended: a process of this host, or an earlier start of this SLURM job on any host."""
    job, restarts = _myself()["slurm_job"], _myself()["slurm_restarts"]
    if job and holder.get("slurm_job") == job and holder.get("slurm_restarts") != restarts:
        return True
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("process"), int):
        return False
    return not _is_alive(holder["process"]) or holder.get("started") != _started(holder["process"])


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs on this host."""
    if _status(process)[:1] == ["Z"]:  # ended, and its parent has not asked for its exit status
        return False
    try:
        os.kill(process, 0)
    except PermissionError:  # of another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _sentence(path: Path, command: str, holder: dict[str, Any] | None) -> str:
    since = time.strftime("%H:%M on %d %B", time.localtime(path.stat().st_mtime)) if path.exists() else "just now"
    if holder is None or holder.get("host") == socket.gethostname():
        who = f"process {holder['process']}" if holder else "another process"
        return f"{path.parent} is in use: {who} runs {command} there since {since}; wait for it, or give --run_dir."
    return (
        f"{path.parent} is in use: process {holder.get('process')} on {holder.get('host')} runs {command} there since "
        f"{since}. If it has ended, remove {path}; else wait for it, or give --run_dir."
    )
