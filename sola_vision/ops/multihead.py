# SPDX-License-Identifier: Apache-2.0
"""Softmax attention, the other kind of layer: torch's own, and on a CPU with AVX2 or AVX-512 a kernel of ours.

torch's attention on a CPU multiplies small matrices with a library, a block at a time, at a third of the processor's
rate (docs/performance.md); `csrc/attention.cpp` keeps the tiles in registers. torch's own (`softmax.py`) is the
definition, and what GPUs, exported graphs, float64 and `ops.use("reference" or "portable")` take.
"""

import torch
from torch import Tensor

from sola_vision.ops import cpu, softmax
from sola_vision.ops.arguments import check_kind, size
from sola_vision.ops.path import exporting_onnx, pinned, transformed


def attention(qkv: Tensor, head_dim: int) -> Tensor:
    """Multi-head softmax attention of every token to all (eq. 1), at a cost that is quadratic in their number.

    qkv [B, N, 3C], in a token queries, then keys, then values, each C / head_dim heads -> [B, N, C].
    Second derivatives are there in half precision and float32 on a CPU with the kernel; elsewhere torch's own have none
    but within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    Raises ValueError for shapes and TypeError for dtypes that do not fit.
    """
    if type(qkv) is not Tensor:  # what torch.fx or torch.export trace with
        return softmax.attention(qkv, head_dim)
    check_kind("attention", qkv=qkv)
    if qkv.ndim != 3 or head_dim < 1 or qkv.shape[2] % (3 * head_dim):
        raise ValueError(f"attention: qkv {size(qkv)} must be [B, N, 3C] with C a multiple of head_dim={head_dim}")
    if transformed(qkv):
        return softmax.products(qkv, head_dim)
    if _torchs_own(qkv):
        return softmax.attention(qkv, head_dim)
    return torch.ops.sola.attention(qkv, head_dim)[0]


_KERNEL = cpu.multiplies(torch.float32)
# in bfloat16 torch's attention multiplies on the processor's matrix unit, which the kernel does not know: faster from
# so many tokens on, but for the backward, which takes torch longer than the unit gains (docs/performance.md)
_MATRIX_UNIT = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
_TOKENS_FOR_MATRIX_UNIT = 256


def _torchs_own(qkv: Tensor) -> bool:
    unit = _MATRIX_UNIT and qkv.dtype == torch.bfloat16 and not (torch.is_grad_enabled() and qkv.requires_grad)
    return (
        not _KERNEL
        or qkv.device.type != "cpu"
        or qkv.dtype == torch.float64
        or (unit and qkv.shape[1] >= _TOKENS_FOR_MATRIX_UNIT)
        or pinned() in ("reference", "portable")
        or torch.compiler.is_exporting()  # what is exported is for any device
        or torch.jit.is_tracing()
        or exporting_onnx()
    )
