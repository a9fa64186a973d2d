"""A rank ends when the process that started it has been killed; `faults/` has the phase of the rendezvous."""

import os
import signal
import subprocess
import sys

import pytest
from forked import ROOT, ends_within

RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
LAUNCHER = """
import signal, subprocess, sys
# The tests themselves may run under nohup, whose setting children inherit.
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2:] else signal.SIG_DFL)
print(subprocess.Popen([sys.executable, sys.argv[1]]).pid, flush=True)
signal.pause()
"""


def launch_and_kill(tmp_path, *options, **own):
    """Kill the launcher of a rank that is in its first import; the rank's process number, and its launcher's output."""
    code = "import time\nimport cli\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "rank.py").write_text(code)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, tmp_path / "rank.py", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rank = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "importing\n"
    launcher.kill()
    launcher.wait()
    return rank, launcher


@pytest.mark.parametrize("options", [[], ["nohup"]])
def test_a_rank_whose_launcher_dies_while_it_imports_ends(tmp_path, options):
    torchrun = {"TORCHELASTIC_RUN_ID": "1"} if options else {}
    rank, launcher = launch_and_kill(tmp_path, *options, **RANK, **torchrun)
    assert ends_within(rank, 30)
    assert "rank 1 ends, because the process that started it has ended" in launcher.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(("options", "own"), [(["nohup"], RANK), ([], {})])
def test_a_rank_under_nohup_and_a_single_process_outlive_their_shell(tmp_path, options, own):
    rank, _ = launch_and_kill(tmp_path, *options, **own)
    try:
        assert not ends_within(rank, 3)
    finally:
        os.kill(rank, signal.SIGKILL)
