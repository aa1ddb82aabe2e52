# SPDX-License-Identifier: Apache-2.0
"""How much memory this process took at most since a moment; a figure that means something needs a process of its own.

Linux can forget an earlier peak; elsewhere the peak since the start of the process has to do.
"""

import sys
from pathlib import Path


def start() -> int:
    """Bytes of this process now; from here on its peak counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:  # not Linux, or not allowed
        return _since_start()


def peak() -> int:
    """The most bytes of this process since `start`."""
    try:
        return _status("VmHWM")
    except OSError:
        return _since_start()


def _since_start() -> int:
    import resource  # Windows has none, where only who asks for memory shall fail

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
