# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every path of the operator in float32, against eq. 9 in float64.

The forward's error is relative to the sum of weights times |v|, element by element. A gradient's is relative to its
largest value, or to a tenth of max|v| max|grad| where the gradient itself is smaller than that.
The referee is the definition where its N^2 is affordable, and the portable form in float64 elsewhere.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sola_vision import ops
from sola_vision.bench.operator import Shape, text
from sola_vision.ops import cpu, portable, reference

SHAPES: tuple[Shape, ...] = ((2, 300, 33), (1, 3136, 4), (1, 3136, 96), (1, 65536, 17))
# name -> w, u, k; with keys beyond 44 the kernels leave their fast path
RANGES = {
    "trained network": ((-1.0, 30.0), (-2.0, 2.0), (-5.0, 5.0)),
    "w -20..200, k -43..43": ((-20.0, 200.0), (-10.0, 10.0), (-43.0, 43.0)),
    "w -20..200, k -50..50": ((-20.0, 200.0), (-10.0, 10.0), (-50.0, 50.0)),
}
INSTRUCTION_SETS = ("generic", "avx2", "avx512")
PATHS = ("reference", "portable", *INSTRUCTION_SETS, "triton")
FORWARD_TARGET, GRADIENT_TARGET = 5e-6, 1e-5
_AFFORDABLE = 2**27  # most weights of the definition
_AT_ONCE = 2**22  # weights in memory at a time

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Result = tuple[Tensor, tuple[Tensor, ...]]


def measure(
    shapes: tuple[Shape, ...], paths: tuple[str, ...], report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Return a row for every shape, range and path; a path that is not available here is reported and skipped."""
    calls = {}
    for path in paths:
        try:
            calls[path] = _path(path)
        except (RuntimeError, ValueError, ImportError) as error:
            report(f"{path} skipped: {error}")
    rows = []
    for shape in shapes:
        for name in RANGES:
            inputs = operands(shape, name)
            report(f"{text(shape)} {name}")
            by_definition = shape[0] * shape[1] ** 2 * shape[2] <= _AFFORDABLE
            truth = definition(inputs) if by_definition else _portable(*(x.double() for x in inputs))
            for path, call in calls.items():
                if path == "reference" and not by_definition:
                    continue
                forward, gradients = errors(call(*inputs), truth, inputs)
                rows.append(
                    {
                        "shape": shape,
                        "range": name,
                        "path": path,
                        "referee": "definition" if by_definition else "portable form in float64",
                        "forward": forward,
                        "gradients": gradients,
                        "met": forward <= FORWARD_TARGET and max(gradients.values()) <= GRADIENT_TARGET,
                    }
                )
    return {"forward_target": FORWARD_TARGET, "gradient_target": GRADIENT_TARGET, "rows": rows}


def operands(shape: Shape, name: str, seed: int = 0) -> Operands:
    """Return decay, bonus, key, value and an output gradient in float32, drawn from a range of RANGES."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(size, generator=g) * (high - low) + low

    decay, bonus, key = RANGES[name]
    value, grad = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return uniform(*decay, shape[2]), uniform(*bonus, shape[2]), uniform(*key, *shape), value, grad


def errors(got: Result, truth: Result, inputs: Operands) -> tuple[float, dict[str, float]]:
    """Return the error of the forward, and those of the gradients by the letter of their input."""
    decay, bonus, key, value, grad = (x.double() for x in inputs)
    scale = portable.wkv(decay, bonus, key, value.abs())
    forward = _worst((got[0].double() - truth[0]).abs() / scale)
    floor = 0.1 * value.abs().max() * grad.abs().max()
    gradients = {
        letter: _worst((gradient.double() - exact).abs() / torch.maximum(exact.abs().max(), floor))
        for letter, gradient, exact in zip("wukv", got[1], truth[1], strict=True)
    }
    return forward, gradients


def definition(inputs: tuple[Tensor, ...]) -> Result:
    """Compute eq. 9 and its gradients in float64, a few rows of its matrix at a time."""
    leaves = [x.double().requires_grad_() for x in inputs[:4]]
    decay, bonus, key, value = leaves
    batch, num_tokens, channels = key.shape
    step = max(1, _AT_ONCE // (batch * num_tokens * channels))
    parts, gradients = [], [torch.zeros_like(x) for x in leaves]
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        with torch.enable_grad():
            out = torch.einsum("btnc,bnc->btc", reference.weights(decay, bonus, key, rows), value)
        parts.append(out.detach())
        for total, part in zip(gradients, torch.autograd.grad(out, leaves, inputs[4][:, rows].double()), strict=True):
            total += part
    return torch.cat(parts, dim=1), tuple(gradients)


def _path(path: str) -> Callable[..., Result]:
    if path == "reference":
        return lambda *inputs: _cast(torch.float32, definition(inputs))
    if path == "portable":
        return _portable
    if path == "triton":
        return _triton()
    before = cpu.instruction_set()
    cpu.instruction_set(path)  # raises if this CPU does not support it
    cpu.instruction_set(before)

    def kernel(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Result:
        before = cpu.instruction_set()
        cpu.instruction_set(path)
        try:
            out, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
            return out, torch.ops.sola.wkv_backward(decay, bonus, key, value, states, grad)
        finally:
            cpu.instruction_set(before)

    return kernel


def _portable(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Result:
    return portable.wkv(decay, bonus, key, value), portable.wkv_backward(decay, bonus, key, value, grad)


def _triton() -> Callable[..., Result]:
    """Return the GPU kernels in Triton's interpreter: the same arithmetic, but slow."""
    reason = ops.missing_kernel("cuda")
    if reason is not None:
        raise RuntimeError(reason)
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, which happens at the first call
    from sola_vision.ops import gpu

    def kernel(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Result:
        with np.errstate(all="ignore"):  # lanes without a token divide 0 by 0
            _, states = gpu.wkv_with_states(decay, bonus, key, value)
            return gpu.wkv(decay, bonus, key, value), gpu.wkv_backward(decay, bonus, key, value, states, grad)

    return kernel


def _cast(dtype: torch.dtype, result: Result) -> Result:
    return result[0].to(dtype), tuple(x.to(dtype) for x in result[1])


def _worst(error: Tensor) -> float:
    worst = error.max().item()
    return worst if worst == worst else float("inf")  # NaN counts as an infinite error
