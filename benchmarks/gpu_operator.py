# SPDX-License-Identifier: Apache-2.0
"""Speed of the operator on a GPU, against HBM, attention, the portable form and Vision-RWKV's kernel."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_vision_rwkv
import torch
from gpu_correct import call, operands
from gpu_timing import Clock, Job, copy_bandwidth, first_line, graphed, interleaved, name_of
from torch import Tensor

SHAPES = [(128, 3136, 96), (1, 3136, 96), (128, 784, 192), (1, 65536, 96), (8, 16384, 96)]
# N C elements that cross memory in two sweeps: k and v twice and y; k, v and y's gradient twice and two gradients
FLOORS = {"forward": 5, "backward": 8}
# nominal memory bandwidth in TB/s by the vendor's data sheet; for other devices only the measured one is used
NOMINAL = {"H200": 4.8, "H100": 3.35, "A100-SXM4-80GB": 2.04, "A100-SXM4-40GB": 1.56, "RTX 4090": 1.01, "L40S": 0.86}


def operator(rounds: int, clock: Clock, vision_rwkv: Path | None) -> Iterator[dict[str, Any]]:
    """Yield microseconds of forward and backward by shape and dtype, also over HBM's time for 5 and 8 N C elements."""
    from sola_vision import ops

    vision_kernel = None
    if vision_rwkv is None:
        print("vision-rwkv: skipped; give its checkout with --vision-rwkv DIR", flush=True)
    else:
        vision_kernel = gpu_vision_rwkv.build(vision_rwkv)
    bandwidth = copy_bandwidth()
    nominal = next((v for k, v in NOMINAL.items() if k in torch.cuda.get_device_name()), None)
    yield {"what": "bandwidth", "copy_tb_s": bandwidth / 1e12, "nominal_tb_s": nominal}
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            if clock.over():
                print(f"operator: time ran out before {shape} {name_of(dtype)}", flush=True)
                return
            inputs = operands(*shape, dtype, calm=True)
            jobs = operator_jobs(ops, inputs, vision_kernel)
            jobs |= graphs(jobs)  # launches from Python may take longer than the kernels
            for name, (median, spread) in interleaved(jobs, rounds, clock).items():
                words = name.split()
                path, direction = words[0], words[1]
                row = {
                    "what": "operator",
                    "path": path,
                    "direction": direction,
                    "launch": "graph" if words[2:] else "eager",
                    "shape": list(shape),
                    "dtype": "float32" if path == "vision-rwkv" else name_of(dtype),
                    "beside": name_of(dtype),  # dtype of the other jobs in the same rounds
                    "microseconds": median,
                    "spread": spread,
                }
                if direction in FLOORS:
                    width = 4 if path == "vision-rwkv" else inputs[2].element_size()
                    floor = FLOORS[direction] * inputs[2].numel() * width / bandwidth * 1e6
                    row["over_hbm_floor_measured"] = median / floor
                    if nominal is not None:
                        row["over_hbm_floor_nominal"] = median / floor * nominal * 1e12 / bandwidth
                yield row
            del jobs, inputs
            torch.cuda.empty_cache()


def operator_jobs(ops: Any, inputs: tuple[Tensor, ...], vision_kernel: Any) -> dict[str, Job]:
    """Return jobs by "path direction": forward, backward alone where possible, and both."""
    decay, bonus, key, value, grad = inputs
    batch, num_tokens, channels = key.shape
    wkv, backward = torch.ops.sola.wkv, torch.ops.sola.wkv_backward
    _, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
    jobs: dict[str, Job] = {
        "triton forward": lambda: wkv(decay, bonus, key, value),
        "triton backward": lambda: backward(decay, bonus, key, value, states, grad),
        "triton both": lambda: call(ops.wkv, inputs),
    }
    # the portable form keeps dozens of float64 copies; attention's cost is quadratic
    if key.numel() <= 2**26:
        jobs["portable forward"] = lambda: torch.ops.sola.wkv_portable(decay, bonus, key, value)
        jobs["portable both"] = lambda: call(torch.ops.sola.wkv_portable, inputs)
    if batch * num_tokens**2 <= 2**33:
        heads = channels // 32
        q, k, v, g = (x.reshape(batch, num_tokens, heads, 32).transpose(1, 2) for x in (value, key, value, grad))
        attention = torch.nn.functional.scaled_dot_product_attention

        def attend() -> Any:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(attention(leaves[0], leaves[1], leaves[2]), leaves, g)

        jobs["sdpa forward"] = lambda: attention(q, k, v)
        jobs["sdpa both"] = attend
    if vision_kernel is not None and channels % 32 == 0:
        # float32 only; the caller divides w by N
        w, u, k32, v32, g32 = (decay / num_tokens).contiguous(), bonus, key.float(), value.float(), grad.float()
        jobs["vision-rwkv forward"] = lambda: vision_kernel.bi_wkv_forward(w, u, k32, v32)
        jobs["vision-rwkv backward"] = lambda: vision_kernel.bi_wkv_backward(w, u, k32, v32, g32)

        def both() -> Any:
            vision_kernel.bi_wkv_forward(w, u, k32, v32)
            return vision_kernel.bi_wkv_backward(w, u, k32, v32, g32)

        jobs["vision-rwkv both"] = both
    return jobs


def graphs(jobs: dict[str, Job]) -> dict[str, Job]:
    """Return CUDA graphs of the kernel's and attention's jobs; Vision-RWKV does not launch on the capturing stream."""
    captured: dict[str, Job] = {}
    for name, job in jobs.items():
        if name.split()[0] in ("triton", "sdpa"):
            try:
                captured[f"{name} graph"] = graphed(job)
            except RuntimeError as error:
                print(f"{name}: no graph: {first_line(error)}", flush=True)
    return captured
