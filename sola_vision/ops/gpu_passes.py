# SPDX-License-Identifier: Apache-2.0
"""The element-wise passes on CUDA: launch the kernels of `triton_passes.py` and register them with the dispatcher.

As in `gpu.py`, Triton is an optional dependency, imported at the first call; no call synchronizes with the device, and
results are bitwise deterministic: no atomics, and every sum has a fixed order. The inputs' dtypes may differ;
arithmetic is float32, and unsupported inputs, above all float64, fall back to the plain form.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sola_vision.ops import gpu, passes
from sola_vision.ops.launch import launch, on_device_of

# values per tile: enough loads in flight, while a thread's share still fits in registers
_TILE_SIZE = 2048
# of the norms' backwards: values per tile; programs that iterate over the tokens, as many as an H100 runs at once, each
# of which writes one row of sums
_BACKWARD_TILE_SIZE, _PROGRAMS = 1024, 528
# of `norm_shift`: values per tile, one vector of a half-precision result per thread; programs that iterate over the
# tokens, four times as many as an H100 runs at once
_SHIFT_TILE_SIZE, _SHIFT_PROGRAMS = 1024, 3168
# above these limits a tile of one token or its sums would not fit in registers, or a token's index not in int32
_MAX_CHANNELS, _MAX_MIXES, _MAX_TOKENS = 4096, 3, 1 << 30
# fused multiply-adds explicitly, because Triton's default changes between versions
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
# maximum registers per thread of the norms' backwards, so that a multiprocessor runs four programs at once; without it
# the compiler would use slightly more
_REGISTERS = 128


def register(library: torch.library.Library) -> None:
    """Register these functions as the CUDA kernels of the passes in the library, if Triton is installed."""
    if gpu.missing() is not None:
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the layer norm of x [..., C] in `dtype`."""
    if _unsupported(x) or dtype == torch.float64:
        return passes._layer_norm(x, weight, bias, eps, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        inputs = [tensor.contiguous() for tensor in (x, weight, bias)]
        channels = x.shape[-1]
        tokens, tile = x.numel() // channels, _tile(channels)
        programs, constants = -(-tokens // tile["T"]), {"C": channels, **tile}
        with on_device_of(x):
            launch(_kernels().layer_norm, programs, (*inputs, out), (eps, tokens), constants, _OPTIONS)
    return out


def layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `layer_norm` with respect to x, weight and bias, in their dtypes, given grad [..., C]."""
    if _unsupported(x) or grad.dtype == torch.float64 or x.numel() == 0:
        return passes._layer_norm_backward(x, weight, bias, eps, grad)
    inputs = [tensor.contiguous() for tensor in (x, weight, grad)]
    channels = x.shape[-1]
    tokens, tile = x.numel() // channels, _tile(channels, _BACKWARD_TILE_SIZE)
    tiles = -(-tokens // tile["T"])
    programs, constants = min(tiles, _PROGRAMS), {"C": channels, **tile}
    with on_device_of(x):
        gx = torch.empty_like(inputs[0])
        partials = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
        sizes, tensors = (eps, tokens, tiles), (*inputs, gx, partials)
        launch(_kernels().layer_norm_backward, programs, tensors, sizes, constants, _backward_options(**tile))
        gw, gb = partials.sum(0)
    return gx, gw.to(weight.dtype), gb.to(bias.dtype)


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
    """Return `passes.norm_shift`: x [B, H, W, C] -> [M, B, H - top - bottom, W, C] in `dtype`, by default that of x."""
    dtype = dtype or x.dtype
    if _unsupported(x) or dtype == torch.float64 or len(mixes) > _MAX_MIXES:
        return passes._norm_shift(x, weight, bias, eps, mixes, top, bottom, dtype)
    batch, height, width, channels = x.shape
    out = torch.empty((len(mixes), *x.shape), dtype=dtype, device=x.device)
    if out.numel():
        kernels = _kernels()
        inputs = [tensor.contiguous() for tensor in (x, weight, bias, mixes)]
        tokens = batch * height * width
        with on_device_of(x):
            stats = torch.empty((2, tokens), dtype=torch.float32, device=x.device)
            tile = _tile(channels)
            programs = -(-tokens // tile["T"])
            constants = {"C": channels, **tile}
            launch(kernels.statistics, programs, (inputs[0], stats), (eps, tokens), constants, _OPTIONS)
            programs, tile = _shift_grid(tokens, channels, min(x.element_size(), out.element_size()))
            sizes, constants = (tokens, height, width), {"C": channels, "M": len(mixes), **tile}
            launch(kernels.norm_shift, programs, (*inputs, stats, out), sizes, constants, _OPTIONS)
    # bands, whose first and last rows are only neighbours, exist on a CPU only; here they need not be fast
    return out[:, :, top : height - bottom].contiguous() if top or bottom else out


def norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `norm_shift` with respect to x [B, H, W, C], weight, bias [C] and mixes [M, C], in the
    inputs' dtypes, given grad [M, B, H, W, C] in any dtype. residual [B, H, W, C] is added to that of x.
    """
    batch, height, width, channels = x.shape
    if x.numel() == 0 or len(mixes) == 0:
        gx, gw, gb, gm = (x.new_zeros(tensor.shape, dtype=tensor.dtype) for tensor in (x, weight, bias, mixes))
        return gx if residual is None else gx.add_(residual), gw, gb, gm
    if _unsupported(x) or _any_float64(grad, residual) or len(mixes) > _MAX_MIXES:
        return passes._norm_shift_backward(x, weight, bias, eps, mixes, grad, residual)
    kernels = _kernels()
    inputs = [tensor.contiguous() for tensor in (x, weight, bias, mixes, grad, grad if residual is None else residual)]
    tile = _tile(channels, _BACKWARD_TILE_SIZE)
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
            {"C": channels, "M": len(mixes), **tile, "RESIDUAL": residual is not None},
            _backward_options(**tile),
        )
        sums = partials.sum(0)
    return gx, sums[0].to(weight.dtype), sums[1].to(bias.dtype), sums[2:].to(mixes.dtype)


def gate(receptance: Tensor, value: Tensor) -> Tensor:
    """Return `passes.gate` in the promoted dtype."""
    if _any_float64(receptance, value):
        return passes._gate(receptance, value)
    return _launch("gate", (receptance, value), [passes._promoted(receptance, value)])[0]


def gate_backward(
    receptance: Tensor, value: Tensor, grad: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` with respect to receptance and value, in the inputs' dtypes; with factors [B],
    those of the gate whose images they multiply.
    """
    if _any_float64(receptance, value, grad, factors):
        return passes._gate_backward(receptance, value, grad, factors)
    inputs, flags = (receptance, value, grad), {"SCALED": factors is not None}
    grad_receptance, grad_value = _launch("gate_backward", inputs, [receptance.dtype, value.dtype], factors, flags)
    return grad_receptance, grad_value


def scaled(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `passes._scaled`."""
    if _any_float64(x, factors) or dtype == torch.float64:
        return passes._scaled(x, factors, dtype)
    return _launch("scaled", (x,), [dtype], factors, {})[0]


def residual_sum(
    residual: Tensor, receptance: Tensor | None, value: Tensor, factors: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Return `passes._residual_sum`, written to `out` if given, which must be contiguous."""
    if _any_float64(residual, receptance, value, factors, out):
        result = passes._residual_sum(residual, receptance, value, factors)
        return result if out is None else out.copy_(result)
    inputs = (residual, value if receptance is None else receptance, value)
    flags = {"GATED": receptance is not None, "SCALED": factors is not None}
    dtypes = [passes._promoted(*inputs)] if out is None else []
    return _launch("residual_sum", inputs, dtypes, factors, flags, out)[0]


def gated_sum(residual: Tensor, receptance: Tensor, value: Tensor) -> Tensor:
    """Return `passes.gated_sum` in the promoted dtype."""
    return residual_sum(residual, receptance, value, None)


def gated_sum_(residual: Tensor, receptance: Tensor, value: Tensor, out: Tensor) -> None:
    """Write `gated_sum` to `out`, which must be contiguous."""
    residual_sum(residual, receptance, value, None, out)


def squared_relu(x: Tensor) -> Tensor:
    """Return `passes.squared_relu`."""
    if _any_float64(x):
        return passes._squared_relu(x)
    return _launch("squared_relu", (x,), [x.dtype])[0]


def squared_relu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `squared_relu` in the dtype of x."""
    if _any_float64(x, grad):
        return passes._squared_relu_backward(x, grad)
    return _launch("squared_relu_backward", (x, grad), [x.dtype])[0]


@cache
def _kernels() -> Any:
    from sola_vision.ops import triton_passes

    return triton_passes


def _launch(
    name: str,
    inputs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] = (),
    factors: Tensor | None = None,
    flags: dict[str, bool] | None = None,
    out: Tensor | None = None,
) -> Sequence[Tensor]:
    """Launch an element-wise kernel on `inputs` of one shape; return a result for each of `dtypes`, or write `out`. A
    kernel with flags takes factors too, one for each image; without factors any tensor, which it does not read.
    """
    first = inputs[0]
    inputs = [x.contiguous() for x in inputs]
    outs = [torch.empty(first.shape, dtype=dtype, device=first.device) for dtype in dtypes] if out is None else [out]
    images = 1 if factors is None else len(factors)
    constants = {"BLOCK": _TILE_SIZE}
    if flags is not None:
        inputs.append(first if factors is None else factors.contiguous())
        constants |= flags
    if first.numel():
        count = first.numel() // images
        with on_device_of(first):
            kernel = getattr(_kernels(), name)
            launch(kernel, images * -(-count // _TILE_SIZE), (*inputs, *outs), (count,), constants, _OPTIONS)
    return outs


def _tile(channels: int, size: int = _TILE_SIZE) -> dict[str, int]:
    """Return the channels (BLOCK) and tokens (T) of a tile of at least `size` values, powers of two."""
    block = max(16, 1 << (channels - 1).bit_length())
    return {"BLOCK": block, "T": max(1, size // block)}


@cache
def _backward_options(BLOCK: int, T: int) -> dict[str, Any]:
    """Return the options of a norm's backward for a tile: a thread has 8 values, whose sums stay in registers."""
    options = {**_OPTIONS, "num_warps": max(4, BLOCK * T // 256)}
    return options if torch.version.hip else {**options, "maxnreg": _REGISTERS}


def _shift_grid(tokens: int, channels: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """Return the number of programs of `norm_shift`, whose vectors together are a whole number of tokens, and its tile:
    vectors of up to 16 bytes of the smaller of its dtypes that do not cross the borders between quarters.
    """
    size = math.gcd(channels, channels // 4, 16 // itemsize)
    vectors, count = channels // size, _SHIFT_TILE_SIZE // size
    programs = min(-(-tokens * vectors // count), _SHIFT_PROGRAMS)
    whole = vectors // math.gcd(vectors, count)
    return -(-programs // whole) * whole, {"VECTOR": size, "VECTORS": count}


def _unsupported(x: Tensor) -> bool:
    """True if the kernels of the norms do not support x [..., C]."""
    return x.dtype == torch.float64 or x.shape[-1] > _MAX_CHANNELS or x.numel() > _MAX_TOKENS * max(1, x.shape[-1])


def _any_float64(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.dtype == torch.float64 for x in tensors)
