# SPDX-License-Identifier: Apache-2.0
"""Figure 1(b): cost over the side of a square image, for SoLA, its full-softmax variant, Swin and DeiT.

MACs are counted on meta tensors. Time and memory are measured in a separate process for each point, so that the peaks
are independent. `python -m sola_vision.analysis.scaling NETWORK SIZE THREADS` measures one point and prints it as JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn

from sola_vision import sola  # noqa: F401 - registers sola_* when this module is run as a script
from sola_vision.analysis import memory
from sola_vision.analysis.cost import build, count, full_softmax
from sola_vision.analysis.process import in_process
from sola_vision.config import tiny

# not in the paper: the sizes of each family; here the tiny ones, all with patches of 4 pixels as its caption says
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "SoLA": ("sola_tiny", {}),
    "SoLA full softmax": ("sola_tiny", {"schedule": full_softmax(tiny()).schedule}),
    "Swin": ("swin_tiny_patch4_window7_224", {}),
    "DeiT": ("deit_tiny_patch16_224", {"patch_size": 4}),
}
SIZES = (16, 32, 64, 128, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280)
ALWAYS = 640  # pixels a side up to which every point is measured
LIMIT = 20.0  # seconds: a larger point is skipped if it would take longer
_TIMEOUT = 900.0  # seconds after which a measurement is abandoned


@dataclass(frozen=True)
class Point:
    """One network at one size; seconds and mebibytes are None if not measured."""

    network: str
    size: int
    gmacs: float
    seconds: float | None = None
    mebibytes: float | None = None


def counted(sizes: Sequence[int] = SIZES) -> Iterator[Point]:
    """Yield the MACs of every network for square images, without heads."""
    for network, (name, changes) in NETWORKS.items():
        for size in sizes:
            square = (size, size)
            cost = count(build(name, square, num_classes=0, **changes), square, name=name)
            yield Point(network, size, cost.gmacs)


def measured(points: list[Point], threads: int, report: Callable[[Point], None] = lambda point: None) -> list[Point]:
    """Return the points with the median seconds of a forward pass of one image and the peak memory above idle.

    Beyond 640 pixels a point is skipped if its expected time, from its MACs and the previous size, exceeds LIMIT.
    """
    done = []
    pace: dict[str, float] = {}  # seconds per GMAC at the largest size so far
    for point in points:
        expected = pace.get(point.network, 0.0) * point.gmacs
        if point.size <= ALWAYS or expected <= LIMIT:
            arguments, subject = (point.network, str(point.size), str(threads)), f"{point.network} at {point.size}"
            found = in_process("sola_vision.analysis.scaling", *arguments, subject=subject, timeout=_TIMEOUT)
            if found is not None:
                point = replace(point, **found)
            pace[point.network] = float("inf") if point.seconds is None else point.seconds / point.gmacs
        report(point)
        done.append(point)
    return done


@torch.inference_mode()
def measure(network: str, size: int, threads: int) -> tuple[float, float]:
    """Measure one point in this process: median seconds and peak growth in mebibytes.

    The median is over at least three forward passes after a warm-up; if that is slow, its time alone is returned.
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
