# SPDX-License-Identifier: Apache-2.0
"""The element-wise passes on CUDA: launches the kernels of `triton_passes.py` and registers them with the dispatcher.

Triton is imported at the first call and may be missing, as in `gpu.py`; no call waits for the device, and results are
the same to the bit from run to run: no atomics, and every sum has a fixed order. Each input may have a dtype of its
own; arithmetic is float32, and what the kernels do not take, float64 above all, goes the plain form's way.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sola_vision.ops import passes
from sola_vision.ops.launch import launch, on_device_of

# values of a tile: what keeps enough reading under way while a thread's share stays in registers
_VALUES = 2048
# programs that go through the tokens in a backward, two a multiprocessor of an H100; each leaves a row of sums
_PROGRAMS = 264
# beyond these a tile of one token or its sums would not stay in registers, or a token's number not in int32
_MOST_CHANNELS, _MOST_MIXES, _MOST_TOKENS = 4096, 3, 1 << 30
# fused multiply-adds by name, because Triton's default changes from version to version
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
# two programs of the backward on a multiprocessor: it takes few registers more, and the compiler would give it those
_BACKWARD_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
if torch.version.hip is None:
    _BACKWARD_OPTIONS["maxnreg"] = 128


def register(library: torch.library.Library) -> None:
    """Make these functions the CUDA kernels of the passes in the library, if Triton is there."""
    if importlib.util.find_spec("triton") is None:
        return
    for name, kernel in (
        ("norm_shift", norm_shift),
        ("norm_shift.dtype", norm_shift),
        ("norm_shift_backward", norm_shift_backward),
        ("gate", gate),
        ("gate_backward", gate_backward),
        ("gated_sum", gated_sum),
        ("gated_sum_", gated_sum_),
        ("squared_relu", squared_relu),
        ("squared_relu_backward", squared_relu_backward),
    ):
        library.impl(name, kernel, "CUDA")


def norm_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    top: int,
    bottom: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`passes.norm_shift`: x [B, H, W, C] -> [M, B, H - top - bottom, W, C] in `dtype`, or else in that of x."""
    dtype = dtype or x.dtype
    if _beyond(x) or dtype == torch.float64:
        return passes._norm_shift(x, weight, bias, eps, mixes, top, bottom).to(dtype)
    batch, height, width, channels = x.shape
    rows, count = height - top - bottom, len(mixes)
    out = torch.empty((count, batch, rows, width, channels), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    kernels = _kernels()
    x, weight, bias, mixes = (tensor.contiguous() for tensor in (x, weight, bias, mixes))
    tokens, made = batch * height * width, batch * rows * width
    with on_device_of(x):
        stats = torch.empty((2, tokens), dtype=torch.float32, device=x.device)
        tile = _tile(channels)
        launch(
            kernels.statistics, -(-tokens // tile["T"]), (x, stats), (eps, tokens), {"C": channels, **tile}, _OPTIONS
        )
        # a program has one of the quarters of the channels or what is beyond them
        quarter, rest = divmod(channels, 4)
        tile = _tile(max(quarter, rest))
        programs = -(-made // tile["T"]) * (4 * (quarter > 0) + (rest > 0))
        sizes = (tokens, made, height, rows, width, top)
        tensors = (x, weight, bias, mixes, stats, out)
        launch(kernels.norm_shift, programs, tensors, sizes, {"C": channels, "M": count, **tile}, _OPTIONS)
    return out


def norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm_shift` for x [B, H, W, C], weight, bias [C] and mixes [M, C], each in its input's dtype, from
    grad [M, B, H, W, C] in any.
    """
    batch, height, width, channels = x.shape
    if x.numel() == 0 or len(mixes) == 0:
        gx, gw, gb, gm = (x.new_zeros(tensor.shape, dtype=tensor.dtype) for tensor in (x, weight, bias, mixes))
        return gx, gw, gb, gm
    if _beyond(x) or grad.dtype == torch.float64 or len(mixes) > _MOST_MIXES:
        return passes._norm_shift_backward(x, weight, bias, eps, mixes, grad)
    kernels = _kernels()
    inputs = [tensor.contiguous() for tensor in (x, weight, bias, mixes, grad)]
    tile = _tile(channels)
    tokens = batch * height * width
    tiles = -(-tokens // tile["T"])
    programs = min(tiles, _PROGRAMS)
    with on_device_of(x):
        gx = torch.empty_like(inputs[0])
        partials = torch.empty((programs, 2 + len(mixes), channels), dtype=torch.float32, device=x.device)
        launch(
            kernels.norm_shift_backward,
            programs,
            (*inputs, gx, partials),
            (eps, tokens, tiles, height, width),
            {"C": channels, "M": len(mixes), **tile},
            _BACKWARD_OPTIONS,
        )
        sums = partials.sum(0)
    return gx, sums[0].to(weight.dtype), sums[1].to(bias.dtype), sums[2:].to(mixes.dtype)


def gate(receptance: Tensor, value: Tensor) -> Tensor:
    """`passes.gate`, in the dtype that torch promotes to."""
    if _double(receptance, value):
        return passes._gate(receptance, value)
    return _launch("gate", (receptance, value), [passes._promoted(receptance, value)])[0]


def gate_backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` for receptance and value, each in its input's dtype."""
    if _double(receptance, value, grad):
        return passes._gate_backward(receptance, value, grad)
    inputs = (receptance, value, grad)
    of_receptance, of_value = _launch("gate_backward", inputs, [receptance.dtype, value.dtype])
    return of_receptance, of_value


def gated_sum(residual: Tensor, receptance: Tensor, value: Tensor) -> Tensor:
    """`passes.gated_sum`, in the dtype that torch promotes to."""
    inputs = (residual, receptance, value)
    if _double(*inputs):
        return passes._gated_sum(*inputs)
    return _launch("gated_sum", inputs, [passes._promoted(*inputs)])[0]


def gated_sum_(residual: Tensor, receptance: Tensor, value: Tensor, out: Tensor) -> None:
    """The same written to `out`, which is contiguous."""
    if _double(residual, receptance, value, out):
        passes._gated_sum_out(residual, receptance, value, out)
    else:
        _launch("gated_sum", (residual, receptance, value), out=out)


def squared_relu(x: Tensor) -> Tensor:
    """`passes.squared_relu`."""
    if _double(x):
        return passes._squared_relu(x)
    return _launch("squared_relu", (x,), [x.dtype])[0]


def squared_relu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `squared_relu` in the dtype of x."""
    if _double(x, grad):
        return passes._squared_relu_backward(x, grad)
    return _launch("squared_relu_backward", (x, grad), [x.dtype])[0]


@cache
def _kernels() -> Any:
    from sola_vision.ops import triton_passes

    return triton_passes


def _launch(
    name: str, inputs: Sequence[Tensor], made: Sequence[torch.dtype] = (), out: Tensor | None = None
) -> Sequence[Tensor]:
    """A kernel over values of one shape, from `inputs` to a result of each dtype in `made`, or to `out`."""
    first = inputs[0]
    inputs = [x.contiguous() for x in inputs]
    outs = [torch.empty(first.shape, dtype=dtype, device=first.device) for dtype in made] if out is None else [out]
    count = first.numel()
    if count:
        with on_device_of(first):
            kernel = getattr(_kernels(), name)
            launch(kernel, -(-count // _VALUES), (*inputs, *outs), (count,), {"BLOCK": _VALUES}, _OPTIONS)
    return outs


def _tile(channels: int) -> dict[str, int]:
    """Channels and tokens of a tile, powers of two."""
    block = max(16, 1 << (channels - 1).bit_length())
    return {"BLOCK": block, "T": max(1, _VALUES // block)}


def _beyond(x: Tensor) -> bool:
    """Whether the kernels of the shift do not take x [B, H, W, C]."""
    return x.dtype == torch.float64 or x.shape[3] > _MOST_CHANNELS or x.numel() > _MOST_TOKENS * max(1, x.shape[3])


def _double(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)
