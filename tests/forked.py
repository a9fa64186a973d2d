"""Start the real command line many times at the price of one import: a server that forks a child per start.

The child calls `cli.main` with its words, as `python cli.py` does once it has imported everything; the server imports
and does nothing else, so that there are no threads to lose in a fork.
"""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEVERAL = ["--config", "configs/shared/ddp_cpu.yaml"]


def serve():
    """Fork for every line of JSON on standard input: words, environment, and a prefix of files to write."""
    # What every child would otherwise do anew.
    from matplotlib import pyplot

    import callbacks.lightning_cli  # noqa: F401
    import cli

    pyplot.figure(figsize=(1, 1)).suptitle("fonts").figure.savefig(io.BytesIO())
    pyplot.close("all")
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            supervise(cli.main, order["words"], order["environment"], Path(order["prefix"]))


def supervise(main, words, environment, prefix):
    """Fork once more, and write down how the child ended; a child that is killed cannot do so itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        work(main, words, environment, prefix)
    put(prefix.with_suffix(".pid"), child)
    _, status = os.waitpid(child, 0)
    put(prefix.with_suffix(".status"), os.waitstatus_to_exitcode(status))
    os._exit(0)


def work(main, words, environment, prefix):
    os.setsid()
    output = os.open(prefix.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(environment)
    # As in a terminal, also where the tests themselves run under nohup or in the background.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["cli.py", *words]
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def put(path, value):
    path.with_suffix(".new").write_text(str(value))
    path.with_suffix(".new").rename(path)


@dataclass
class Process:
    """One rank of a started command."""

    prefix: Path
    orphaned: bool = False

    @property
    def pid(self):
        path = self.prefix.with_suffix(".pid")
        while not path.exists():
            time.sleep(0.002)
        return int(path.read_text())

    @property
    def parent(self):
        """The process that started this one, and would tell its status."""
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])

    def poll(self):
        """Exit status, minus the signal's number, or None while it runs; an orphan's status is not known, so that 9."""
        if self.orphaned:
            return None if is_alive(self.pid) else -signal.SIGKILL
        path = self.prefix.with_suffix(".status")
        return int(path.read_text()) if path.exists() else None

    def orphan(self):
        """Kill the process that started this one."""
        if self.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.kill(self.parent, signal.SIGKILL)
                self.orphaned = True

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s:\n{self.output[-3000:]}")
            time.sleep(0.005)
        return status

    def signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def output(self):
        path = self.prefix.with_suffix(".log")
        return path.read_text(errors="replace") if path.exists() else ""


class Server:
    """Use it in a `with`; `folder` holds the output of every process."""

    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "faults")])
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "NO_ALBUMENTATIONS_UPDATE": "1"}

    def __enter__(self):
        words = [sys.executable, __file__]
        self.server = subprocess.Popen(words, cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()

    def start(self, *words, ranks=1, environment=None, only=None):
        """Start a command on one or more processes, as `torchrun` would; a list of `Process`.

        `only` starts some of the ranks, so that they wait for the others.
        """
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "forked", **address}
        started = []
        for rank in range(ranks) if only is None else only:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", **world} if ranks > 1 else {}
            prefix = self.folder / f"{self.count:04d}-{words[0]}-r{rank}"
            order = {
                "words": [*words, *([*SEVERAL, f"--trainer.devices={ranks}"] if ranks > 1 else [])],
                "environment": {**own, **(environment or {})},
                "prefix": str(prefix),
            }
            self.server.stdin.write(json.dumps(order) + "\n")
            self.server.stdin.flush()
            started.append(Process(prefix))
        self.count += 1
        return started

    def run(self, *words, check=True, **options):
        """Start, wait for all ranks, and return them."""
        ranks = self.start(*words, **options)
        status = [rank.wait() for rank in ranks]
        if check and any(status):
            raise AssertionError(f"{words} ended with {status}:\n" + "\n".join(r.output[-4000:] for r in ranks))
        return ranks


def is_alive(pid):
    """Whether a process runs; a zombie, whose new parent has not asked for its status yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_within(pid, seconds):
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    # Children are nobody's to wait for: each has a supervisor.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    serve()
