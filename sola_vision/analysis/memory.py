# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process since a given moment; for a meaningful number measure in a separate process.

Linux can reset the peak; elsewhere the peak since the start of the process is used.
"""

import sys
from pathlib import Path


def start() -> int:
    """Return the bytes in use by this process, and reset its peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:  # not Linux, or not allowed
        return _since_start()


def peak() -> int:
    """Return the peak number of bytes since `start`."""
    try:
        return _status("VmHWM")
    except OSError:
        return _since_start()


def _since_start() -> int:
    import resource  # not on Windows, where only measuring memory should fail

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
