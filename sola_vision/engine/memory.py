# SPDX-License-Identifier: Apache-2.0
"""Memory that stays with the process: a forward on a CPU takes and returns the same large blocks again and again."""

import ctypes
import sys

# of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_heap() -> None:
    """Let glibc keep freed memory instead of giving it back to the system at once.

    Fetching it again costs page faults in every forward. The process holds on to its largest memory until it ends.
    Nothing happens with other C libraries and allocators.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # large blocks from the heap too
        mallopt(_TRIM_THRESHOLD, -1)  # never
