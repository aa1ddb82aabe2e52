# SPDX-License-Identifier: Apache-2.0
"""Speed of the element-wise passes on a GPU: the package's operators and plain torch, against HBM's time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import Clock, Job, copy_bandwidth, first_line, interleaved, name_of
from torch import Tensor

BATCH, SIDE, CHANNELS, MIXES = 128, 56, 96, 3  # stage 1 of sola_tiny and sola_small
Pass = Callable[..., Tensor]


def passes(rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yield microseconds of forward and backward, also over the time to move every input and output once."""
    bandwidth = copy_bandwidth()
    yield {"what": "bandwidth", "copy_tb_s": bandwidth / 1e12}
    for dtype in (torch.bfloat16, torch.float32):
        for name in ("layer_norm", "norm_shift", "gate", "gated_sum", "residual_sum", "squared_relu"):
            if clock.over():
                print(f"passes: time ran out before {name} {name_of(dtype)}", flush=True)
                return
            try:
                jobs, moved = pass_jobs(name, dtype)
                times = interleaved(jobs, rounds, clock)
            except RuntimeError as error:  # a failing pass must not stop the others
                print(f"passes: {name} {name_of(dtype)} skipped: {first_line(error)}", flush=True)
                continue
            for key, (median, spread) in times.items():
                path, direction = key.split()
                floor = moved[direction] / bandwidth * 1e6
                yield {
                    "what": "pass",
                    "name": name,
                    "path": path,
                    "direction": direction,
                    "dtype": name_of(dtype),
                    "microseconds": median,
                    "spread": spread,
                    "over_hbm_floor_measured": median / floor,
                }
            del jobs
            torch.cuda.empty_cache()


def pass_jobs(name: str, dtype: torch.dtype, device: str = "cuda") -> tuple[dict[str, Job], dict[str, int]]:
    """Return jobs by "path direction", and the least bytes that a direction moves. gated_sum has gate's backward, that
    of residual_sum is the multiplication by each image's factor.
    """
    from sola_vision.ops import gpu_passes
    from sola_vision.ops.passes import PLAIN

    inputs = operands(name, dtype, device)
    kernel, portable = getattr(gpu_passes, name), getattr(PLAIN, name)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    out = kernel(*inputs)
    grad = torch.randn_like(out)
    back_inputs = backward_inputs(name, inputs, grad)
    backward = {"gated_sum": "gate_backward", "residual_sum": "scaled"}.get(name, f"{name}_backward")
    kernel_back, portable_back = getattr(gpu_passes, backward), getattr(PLAIN, backward)
    gradients = kernel_back(*back_inputs)
    moved = {
        "forward": nbytes(*tensors, out),
        "backward": nbytes(*back_inputs, *([gradients] if isinstance(gradients, Tensor) else gradients)),
    }
    del out, gradients

    # without grad mode, as in autograd's backward, since the plain forms would build a graph
    def without_grad(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Job:
        return torch.no_grad()(lambda: function(*arguments))

    jobs = {
        "kernel forward": without_grad(kernel, inputs),
        "portable forward": without_grad(portable, inputs),
        "kernel backward": without_grad(kernel_back, back_inputs),
        "portable backward": without_grad(portable_back, back_inputs),
    }
    return jobs, moved


def operands(name: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Return the operator's arguments. Parameters have x's dtype, and so has the result of layer_norm."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device).to(dtype)

    image = (BATCH, SIDE, SIDE, CHANNELS)
    if name == "layer_norm":
        return draw(*image), draw(CHANNELS), draw(CHANNELS), 1e-6, dtype
    if name == "norm_shift":
        return draw(*image), draw(CHANNELS), draw(CHANNELS), 1e-6, draw(MIXES, CHANNELS).sigmoid(), 0, 0
    if name == "residual_sum":
        return draw(*image), None, draw(*image), draw(BATCH)
    if name == "squared_relu":
        return (draw(*image[:3], 4 * CHANNELS),)
    return tuple(draw(*image) for _ in range({"gate": 2, "gated_sum": 3}[name]))


def backward_inputs(name: str, inputs: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """Return the arguments of the operator's backward."""
    if name == "layer_norm":
        return (*inputs[:4], grad)
    if name == "norm_shift":
        return (*inputs[:5], grad)
    if name == "gated_sum":
        return (*inputs[1:], grad)
    if name == "residual_sum":
        return grad, inputs[3], grad.dtype
    return (*inputs, grad)


def nbytes(*values: Any) -> int:
    """Return the bytes of all tensors among the values."""
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor))
