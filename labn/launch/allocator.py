"""Freed memory stays with the process: on the CPU, handing it back costs more than a training step can spare."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of returning it to the system; no effect elsewhere.

    By default every tensor above 32 MiB is mapped and unmapped anew, and the top of the heap is trimmed, so that each
    step touches its pages for the first time again: about a tenth of the time of a step that holds two graphs, as a
    guided one does. The price is that the process keeps its largest size until it ends.

    Returns:
        Whether the C library took all settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    return all(bool(mallopt(name, value)) for name, value in settings)
