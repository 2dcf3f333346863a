"""Memory that the CPU's activations freed stays with the process.

glibc returns every block above 32 MB to the system and takes it back, page by page, at the next step. Keeping it cut
the CPU time of a batch of 64 through MobileNetV2 at 128 px, forward and backward, from 21 to 12 ms per image (one
thread).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc's malloc so; nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_MAX, 0)
