# SPDX-License-Identifier: Apache-2.0
"""Timing of the GPU's benchmarks: jobs in interleaved rounds, each call timed by device events.

A time is the median over rounds of the shortest call in each, with its spread (interquartile range over median).
"""

import functools
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sola_vision.bench.rounds import Job, spread

# microseconds from which a job has three timed calls a round; one from ten times as long
SLOW = 60_000


class Clock:
    """The time limit of a command."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def over(self) -> bool:
        """True if the time has run out."""
        return time.monotonic() > self.end


def interleaved(
    jobs: dict[str, Job], rounds: int, clock: Clock, calls: int = 10, hidden: bool = True
) -> dict[str, tuple[float, float]]:
    """Return median and spread in microseconds; in each round the best call after two warm-up calls counts. With
    `hidden` launches overlap with a wait on the device.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in list(jobs.items()):
            try:
                job()
                second = timed(job, hidden)
                timed_calls = 1 if second > 10 * SLOW else min(calls, 3) if second > SLOW else calls
                times[name].append(min(timed(job, hidden) for _ in range(timed_calls)))
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory, skipped", flush=True)
                torch.cuda.empty_cache()
                del jobs[name], times[name]
        if clock.over():
            break
    return {name: (statistics.median(x), spread(x)) for name, x in times.items() if x}


_flush: list[Tensor] = []
# clock cycles that the device waits for launches: 2 ms
_WAIT = 4_000_000


def timed(job: Job, hidden: bool = True) -> float:
    """Return a call's microseconds by device events, after a pass over memory, which evicts caches, and a wait that
    hides up to 2 ms of launches.
    """
    if not _flush:
        _flush.append(torch.empty(2**28, dtype=torch.uint8, device="cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush[0].zero_()
    if hidden:
        torch.cuda._sleep(_WAIT)
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def graphed(job: Job) -> Job:
    """Return the job as a replay of a CUDA graph: the device's time without Python's launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = job()

    return functools.partial(_replay, graph, kept, job)


def _replay(graph: torch.cuda.CUDAGraph, outputs: Any, _job: Job) -> Any:
    """Replay a graph; its outputs and the tensors that the captured job owns must stay alive as long."""
    graph.replay()
    return outputs


def copy_bandwidth() -> float:
    """Return the bytes per second, read plus written, of a large copy."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source)) for _ in range(20)) * 1e-6
    return 2 * source.numel() * source.element_size() / seconds


# ---- output


def write(path: Path, rows: list[dict[str, Any]], commit: str | None = None) -> None:
    """Write rows with the machine and versions; `commit` is for a copy without git history."""
    from sola_vision.engine.log import surroundings, write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    where = surroundings(device, processes=1) | {
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "triton": triton_version(),
    }
    if commit is not None:
        where["commit"] = commit
    where["command"] = without_folders(where["command"])
    write_json(path, {**where, "rows": rows})


def without_folders(command: str) -> str:
    """Remove the machine's own folders, and the commit, which is stored separately, from a command to be published."""
    return re.sub(r"(--vision-rwkv) \S+", r"\1 DIR", re.sub(r" --(out|commit) \S+", "", command))


def triton_version() -> str | None:
    """Return triton's version, or None if it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def report(row: dict[str, Any]) -> None:
    """Print a row in one line."""
    print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
