# SPDX-License-Identifier: Apache-2.0
"""The kernels that take a GPU's time in a forward and a training step of networks, and in the operator's calls."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_correct import operands
from gpu_models import model_jobs
from gpu_timing import Clock, Job, first_line, name_of

MODELS = ["sola_tiny", "sola_small", "swin_tiny_patch4_window7_224"]
SHAPES = [((128, 3136, 96), torch.bfloat16), ((1, 3136, 96), torch.bfloat16)]
LINES = 25


def profiles(names: list[str], size: int, batch: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yield a row for each call, with the kernels that take longest, and its time on the device and on the host."""
    for shape, dtype in SHAPES:
        inputs = operands(*shape, dtype, calm=True)
        for direction, job in operator_calls(inputs).items():
            yield {
                "what": "operator",
                "shape": list(shape),
                "dtype": name_of(dtype),
                "direction": direction,
            } | profiled(job)
    for name in names:
        if clock.over():
            print(f"profile: time ran out before {name}", flush=True)
            return
        try:
            for key, job in model_jobs(name, size, batch, "eager").items():
                condition = {"direction": key.split()[1], "batch": batch, "size": size}
                yield {"what": "model", "model": name, **condition} | profiled(job)
        except Exception as error:  # a failing model must not stop the others
            print(f"profile: {name} skipped: {first_line(error)}", flush=True)
        torch.cuda.empty_cache()


def operator_calls(inputs: tuple[torch.Tensor, ...]) -> dict[str, Job]:
    """Return the operator's forward and backward as jobs."""
    wkv, backward = torch.ops.sola.wkv, torch.ops.sola.wkv_backward
    *operands, grad = inputs
    _, states = torch.ops.sola.wkv_with_states(*operands)
    return {"forward": lambda: wkv(*operands), "backward": lambda: backward(*operands, states, grad)}


def profiled(job: Job) -> dict[str, Any]:
    """Profile one call: its kernels and its times in microseconds.

    device_us is the sum over kernels, wall_us the time from the first launch to the last result, launch_us the time
    until Python has launched everything. If launch_us is close to wall_us, launches are the bottleneck.
    """
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        job()
    walls = [wall(job) for _ in range(5)]
    launch_us, wall_us = min(walls, key=lambda pair: pair[1])
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        job()
        torch.cuda.synchronize()
    return {"wall_us": wall_us, "launch_us": launch_us} | kernels(profiler.key_averages())


def wall(job: Job) -> tuple[float, float]:
    """Return the microseconds of a call until all is launched, and until all is finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (launched - start) * 1e6, (time.perf_counter() - start) * 1e6


def kernels(events: Any) -> dict[str, Any]:
    """Return the kernels of a profile that ran on the device, by time."""
    # annotations cover kernels that are already counted
    ran = [
        e
        for e in events
        if e.device_type != torch.autograd.DeviceType.CPU
        and e.self_device_time_total > 0
        and not getattr(e, "is_user_annotation", False)
    ]
    ran.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in ran)
    table = [
        {
            "name": e.key[:90],
            "calls": e.count,
            "microseconds": e.self_device_time_total,
            "share": e.self_device_time_total / total,
        }
        for e in ran[:LINES]
    ]
    return {"device_us": total, "launched": sum(e.count for e in ran), "kernels": table}


def show(row: dict[str, Any]) -> None:
    """Print a row as a heading and a table."""
    times = (
        f"device {row['device_us']:,.0f} us, wall {row['wall_us']:,.0f} us, launched after {row['launch_us']:,.0f} us"
    )
    subject = row.get("model") or f"operator {'x'.join(map(str, row['shape']))} {row['dtype']}"
    print(f"\n{subject}, {row['direction']}: {times}, {row['launched']} kernels")
    for line in row["kernels"]:
        print(f"{line['microseconds']:10,.0f}  {100 * line['share']:5.1f} %  {line['calls']:5}  {line['name']}")
    print(end="", flush=True)
