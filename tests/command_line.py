"""Start the real command line as a process, and kill it where a test wants."""

import atexit
import contextvars
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from forked import Server

ROOT = Path(__file__).parents[1]

TINY = [
    "--data.init_args.n_train=24",
    "--data.init_args.n_val=8",
    "--data.init_args.n_test=13",
    "--data.init_args.batch_size=4",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--wandb=disabled",
]


def command(*arguments, config="configs/quickstart.yaml", run_dir=None, tiny=True):
    words = [sys.executable, "cli.py", arguments[0], "--config", config]
    words += [f"--run_dir={run_dir}"] if run_dir else []
    return words + (TINY if tiny else []) + list(arguments[1:])


def call_main(argv):
    """The command line in this process; what its parser leaves in context variables stays behind."""
    from cli import main

    contextvars.copy_context().run(main, argv)


def environment(threads=1):
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_SILENT": "true"}


@cache
def server():
    """What forks the commands of this test process, so that they share one import of everything."""
    folder = tempfile.mkdtemp(prefix="labn_commands_")
    started = Server(folder).__enter__()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(started.__exit__)
    return started


def start(*arguments, ranks=1, **options):
    """The running processes of a command, one per rank, with the environment of this one."""
    words = command(*arguments, **options)[2:]
    here = server().environment
    changed = {name: value for name, value in environment().items() if here.get(name) != value}
    return server().start(*words, ranks=ranks, environment=changed)


def run(*arguments, timeout=300, **options):
    """The finished process of rank zero, with its output; every rank has ended well."""
    processes = start(*arguments, **options)
    for process in processes:
        if process.wait(timeout):
            raise AssertionError(f"exit {process.poll()}\n{process.output[-9000:]}")
    return processes[0]


def one_step(folder):
    """`--ckpt_path` of the quickstart's network after one step: random weights are not tested."""
    run("fit", "--trainer.max_epochs=1", *(f"--trainer.limit_{s}_batches=1" for s in ("train", "val")), run_dir=folder)
    return f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"


def run_anew(*arguments, timeout=300, **options):
    """The output of a command in an interpreter of its own, which has imported nothing yet."""
    words = command(*arguments, **options)
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    return done.stdout + done.stderr


def run_and_kill(*arguments, when, timeout=300, **options):
    """Start, wait until `when()` is true, then `kill -9` the whole process group."""
    (process,) = start(*arguments, **options)
    end = time.monotonic() + timeout
    try:
        while not when():
            if process.poll() is not None:
                raise AssertionError(f"the process ended by itself with {process.poll()} before it could be killed")
            if time.monotonic() > end:
                raise AssertionError("the moment to kill the process never came")
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launch(*words, nodes=1, processes=1):
    """`torchrun` of every node, on this machine; ends when all have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    launchers = [
        subprocess.Popen(
            [*torchrun, f"--node_rank={node}", *map(str, words)],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    try:
        said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0] * nodes, "\n".join(said)[-6000:]
