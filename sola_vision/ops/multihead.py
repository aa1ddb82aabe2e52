# SPDX-License-Identifier: Apache-2.0
"""Softmax attention, for the softmax layers: torch's SDPA, or the kernel `csrc/attention.cpp` on a CPU with AVX2 or
AVX-512.

On a CPU torch's SDPA multiplies small matrices with a BLAS library, one block at a time, at a third of the processor's
peak rate (docs/performance-layers.md); the kernel keeps the tiles in registers, or on the matrix unit (AMX). SDPA
(`softmax.py`) is the definition, and is used on GPUs, in exported graphs, in float64 and under `ops.use("reference")`
and `ops.use("portable")`.
"""

import torch
from torch import Tensor

from sola_vision.ops import cpu, softmax
from sola_vision.ops.arguments import check_kind, size
from sola_vision.ops.path import exporting, exporting_onnx, pinned, transformed


def attention(qkv: Tensor, head_dim: int) -> Tensor:
    """Multi-head softmax attention of every token to all tokens (eq. 1), at a cost quadratic in N.

    qkv [B, N, 3C], per token the queries, keys and values of C / head_dim heads -> [B, N, C].
    Double backward works with the kernel (half precision and float32 on a CPU); torch's SDPA supports it only within
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    Raises ValueError for unsupported shapes and TypeError for unsupported dtypes.
    """
    if type(qkv) is not Tensor:  # a proxy of torch.fx or a fake tensor of torch.export
        return softmax.attention(qkv, head_dim)
    check_kind("attention", qkv=qkv)
    if qkv.ndim != 3 or head_dim < 1 or qkv.shape[2] % (3 * head_dim):
        raise ValueError(f"attention: qkv {size(qkv)} must be [B, N, 3C] with C a multiple of head_dim={head_dim}")
    if transformed(qkv):
        return softmax.products(qkv, head_dim)
    if _use_sdpa(qkv):
        return softmax.attention(qkv, head_dim)
    return torch.ops.sola.attention(qkv, head_dim)[0]


def _use_sdpa(qkv: Tensor) -> bool:
    return (
        qkv.device.type != "cpu"
        or qkv.dtype == torch.float64
        or not cpu.multiplies(torch.float32)  # depends on the current instruction set
        or pinned() in ("reference", "portable")
        or exporting()  # an exported graph must run on any device
        or torch.jit.is_tracing()
        or exporting_onnx()
    )
