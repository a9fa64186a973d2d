import platform
import subprocess
import sys

import pytest

# 512 MiB in 64 MiB pieces, freed and taken again: once the heap has settled, the pages are there already.
# It may grow by a piece or two before that, so the least of some later rounds counts.
SCRIPT = """
import resource, sys, torch
from labn.launch.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(2**24) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(min(touch() for _ in range(5)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_pages_of_freed_tensors_are_reused():
    runs = {
        mode: subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
        for mode in ("keep", "return")
    }
    assert int(runs["keep"].stdout) < 0.1 * int(runs["return"].stdout)
