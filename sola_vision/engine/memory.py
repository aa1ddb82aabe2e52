# SPDX-License-Identifier: Apache-2.0
"""Allocator settings: a forward pass on a CPU allocates and frees the same large blocks again and again."""

import ctypes
import sys

# constants of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_heap() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    Allocating it again costs page faults in every forward pass. The process keeps its peak memory until it exits.
    No effect with other C libraries and allocators.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # allocate large blocks from the heap as well
        mallopt(_TRIM_THRESHOLD, -1)  # never return memory
