# SPDX-License-Identifier: Apache-2.0
"""Figure 1(b): how cost grows with the side of a square image, for SoLA, its full-softmax variant, Swin and DeiT.

MACs are counted on meta tensors; time and memory are measured, each point in a process of its own, so that its peak
is its own. `python -m sola_vision.analysis.scaling NETWORK SIZE` measures one point and prints it as JSON.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from sola_vision import sola  # noqa: F401 - registers sola_* where this module is run on its own
from sola_vision.analysis import memory
from sola_vision.analysis.cost import build, count, full_softmax
from sola_vision.config import tiny

# not in the paper: which sizes of each family; the tiny ones here, all with patches of 4 pixels as its caption says
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "SoLA": ("sola_tiny", {}),
    "SoLA full softmax": ("sola_tiny", {"schedule": full_softmax(tiny()).schedule}),
    "Swin": ("swin_tiny_patch4_window7_224", {}),
    "DeiT": ("deit_tiny_patch16_224", {"patch_size": 4}),
}
SIZES = (16, 32, 64, 128, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280)
ALWAYS = 640  # pixels a side up to which every point is measured
LIMIT = 20.0  # seconds that a larger one may take
_PATIENCE = 900.0  # seconds after which a point counts as not measured


@dataclass(frozen=True)
class Point:
    """One network at one size. seconds and mebibytes are measured or None."""

    network: str
    size: int
    gmacs: float
    seconds: float | None = None
    mebibytes: float | None = None


def counted(sizes: Sequence[int] = SIZES) -> Iterator[Point]:
    """MACs of every network at square images, without their heads."""
    for network, (name, changes) in NETWORKS.items():
        for size in sizes:
            square = (size, size)
            cost = count(build(name, square, num_classes=0, **changes), square, name=name)
            yield Point(network, size, cost.gmacs)


def measured(points: list[Point], threads: int, report: Callable[[Point], None] = lambda point: None) -> list[Point]:
    """The same points with the median seconds of a forward of one image, and the most memory above the idle process.

    Beyond 640 pixels a point is left out if it would take more than LIMIT, judged by MACs and the size before.
    """
    done = []
    pace: dict[str, float] = {}  # seconds a GMAC at the largest size so far
    for point in points:
        expected = pace.get(point.network, 0.0) * point.gmacs
        if point.size <= ALWAYS or expected <= LIMIT:
            seconds, mebibytes = _in_a_process(point, threads)
            point = Point(point.network, point.size, point.gmacs, seconds, mebibytes)
            if seconds is not None:
                pace[point.network] = seconds / point.gmacs
            else:
                pace[point.network] = float("inf")
        report(point)
        done.append(point)
    return done


def _in_a_process(point: Point, threads: int) -> tuple[float | None, float | None]:
    command = [sys.executable, "-m", "sola_vision.analysis.scaling", point.network, str(point.size), str(threads)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        print(f"{point.network} at {point.size}: not measured, it took over {_PATIENCE:.0f} s", file=sys.stderr)
        return None, None
    if finished.returncode:  # out of memory, as a rule
        last = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        print(f"{point.network} at {point.size}: not measured: {last}", file=sys.stderr)
        return None, None
    result = json.loads(finished.stdout)
    return result["seconds"], result["mebibytes"]


@torch.inference_mode()
def measure(network: str, size: int, threads: int) -> tuple[float, float]:
    """One point in this process: median seconds of at least three forwards after one to warm up (that one alone if it
    is slow), and the mebibytes that the process grew by at most.
    """
    torch.set_num_threads(threads)
    name, changes = NETWORKS[network]
    if not name.startswith("sola_"):
        changes = {**changes, "img_size": size}
    model: nn.Module = timm.create_model(name, num_classes=0, **changes).eval()
    image = torch.randn(1, 3, size, size)
    idle = memory.start()
    seconds = [_timed(model, image)]
    if seconds[0] < LIMIT / 4:
        seconds = []
        while len(seconds) < 3 or (sum(seconds) < 1 and len(seconds) < 50):
            seconds.append(_timed(model, image))
    return statistics.median(seconds), (memory.peak() - idle) / 2**20


def _timed(model: nn.Module, image: torch.Tensor) -> float:
    start = time.perf_counter()
    model(image)
    return time.perf_counter() - start


if __name__ == "__main__":
    _seconds, _mebibytes = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"seconds": _seconds, "mebibytes": _mebibytes}))
