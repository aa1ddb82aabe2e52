# SPDX-License-Identifier: Apache-2.0
"""Measurements in processes of their own, whose peak memory is not that of an earlier measurement."""

import json
import subprocess
import sys
from typing import Any


def in_process(module: str, *arguments: str, subject: str, timeout: float | None = None) -> dict[str, Any] | None:
    """Return the JSON document that `python -m MODULE ARGUMENTS` prints; None, with a line on standard error about the
    subject, if it fails (usually killed for lack of memory) or takes more than `timeout` seconds.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        print(f"sola: {subject} could not be measured: it took over {timeout:g} s", file=sys.stderr)
        return None
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        print(f"sola: {subject} could not be measured: {last}", file=sys.stderr)
        return None
    document: dict[str, Any] = json.loads(finished.stdout)
    return document
