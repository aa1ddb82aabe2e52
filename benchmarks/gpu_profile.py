# SPDX-License-Identifier: Apache-2.0
"""Which kernels a GPU's time goes to: one forward and one training step of networks, and the operator's calls."""

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
    """A row for each call, with the kernels that take longest and its time on the device and on the clock."""
    for shape, dtype in SHAPES:
        inputs = operands(*shape, dtype, calm=True)
        for direction, job in operator_calls(inputs).items():
            yield {"what": "operator", "shape": list(shape), "dtype": name_of(dtype), "direction": direction} | taken(
                job
            )
    for name in names:
        if clock.over():
            print(f"profile: time is over before {name}", flush=True)
            return
        try:
            for key, job in model_jobs(name, size, batch, "eager").items():
                condition = {"direction": key.split()[1], "batch": batch, "size": size}
                yield {"what": "model", "model": name, **condition} | taken(job)
        except Exception as error:  # one model that fails must not cost the others' numbers
            print(f"profile: {name} left out: {first_line(error)}", flush=True)
        torch.cuda.empty_cache()


def operator_calls(inputs: tuple[torch.Tensor, ...]) -> dict[str, Job]:
    wkv, backward = torch.ops.sola.wkv, torch.ops.sola.wkv_backward
    *operands, grad = inputs
    _, states = torch.ops.sola.wkv_with_states(*operands)
    return {"forward": lambda: wkv(*operands), "backward": lambda: backward(*operands, states, grad)}


def taken(job: Job) -> dict[str, Any]:
    """The kernels of one call, and its times in microseconds: device_us is the sum over kernels, wall_us from the first
    launch to the last result, launch_us until Python has launched everything. Where launch_us comes near wall_us,
    the launches are the limit.
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
    torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (launched - start) * 1e6, (time.perf_counter() - start) * 1e6


def kernels(events: Any) -> dict[str, Any]:
    """The table of a profile: what ran on the device, by the time it took."""
    # annotations span kernels that are counted themselves
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
    """A row as a head and a table."""
    times = (
        f"device {row['device_us']:,.0f} us, wall {row['wall_us']:,.0f} us, launched after {row['launch_us']:,.0f} us"
    )
    subject = row.get("model") or f"operator {'x'.join(map(str, row['shape']))} {row['dtype']}"
    print(f"\n{subject}, {row['direction']}: {times}, {row['launched']} kernels")
    for line in row["kernels"]:
        print(f"{line['microseconds']:10,.0f}  {100 * line['share']:5.1f} %  {line['calls']:5}  {line['name']}")
    print(end="", flush=True)
