# SPDX-License-Identifier: Apache-2.0
"""The Bi-WKV operator and the passes around it: `wkv` is eq. 9, `use` pins the path that computes it.

The paths: "reference" is the definition (`reference.py`, O(N^2)), "portable" is plain torch at linear cost
(`portable.py`), "native" the compiled kernels (`cpu.py`, `gpu.py`). Without `use`, torch's dispatcher takes the kernel
of the tensors' device, and the portable form where there is none. A backward takes the path of its forward.
`torch.onnx.export` sees matrix products (`matrices.py`), torch.func and forward-mode differentiation the portable form.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from sola_vision.ops import cpu, gpu, matrices, portable, reference, register
from sola_vision.ops.arguments import check_wkv
from sola_vision.ops.multihead import attention
from sola_vision.ops.passes import gate, gated_sum, norm_shift, quad_shift, squared_relu
from sola_vision.ops.path import Path, exporting_onnx, pinned, seen_through, tangents, transformed, use
from sola_vision.ops.vision_rwkv import published_wkv

__all__ = [
    "Path",
    "attention",
    "gate",
    "gated_sum",
    "missing_kernel",
    "norm_shift",
    "pinned",
    "published_wkv",
    "quad_shift",
    "seen_through",
    "squared_relu",
    "tangents",
    "use",
    "wkv",
]

cpu.load()
gpu.register(register.library)


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Bidirectional WKV attention, eq. 9: per channel, token t reads every token i with the weights

        softmax_i(k_i - (|t - i| - 1) w / N)   and   u + k_t for itself.

    decay w [C] (divided by N here), bonus u [C], key and value [B, N, C] -> [B, N, C] in value's dtype, which is
    float64, float32, bfloat16 or float16; decay and bonus may stay in float32 beside half-precision key and value.
    The cost is linear in N; a backward that is to be differentiated again takes the portable form.
    Raises ValueError for shapes, TypeError for dtypes and ValueError for devices that do not fit together.
    """
    check_wkv("wkv", decay, bonus, key, value)
    if exporting_onnx():
        return matrices.wkv(decay, bonus, key, value)
    if pinned() == "reference":
        return reference.wkv(decay, bonus, key, value)
    if transformed(decay, bonus, key, value):
        # under vmap the scans write into memory like key's and value's, which has to be a batch when anything is
        zero = torch.zeros_like(decay + key + value)
        return portable.wkv(decay, bonus, key + zero.to(key.dtype), value + zero.to(value.dtype))
    if pinned() == "portable":
        return torch.ops.sola.wkv_portable(decay, bonus, key, value)
    if pinned() == "native":
        reason = missing_kernel(key.device.type)
        if reason is not None:
            raise RuntimeError(f'ops.use("native"): {reason}')
    elif not torch.compiler.is_compiling():
        _say_once(key.device.type)
    return torch.ops.sola.wkv(decay, bonus, key, value)


def missing_kernel(device: str) -> str | None:
    """Why no compiled kernel runs on a device type such as "cpu" or "cuda"; None if one does."""
    if device == "cpu":
        return cpu.load()
    if device == "cuda":
        return gpu.missing()
    return f"there is no compiled kernel for {device}"


@cache
def _say_once(device: str) -> None:
    reason = missing_kernel(device) if device != "meta" else None
    if reason is not None:
        warnings.warn(f"sola_vision: {reason}; the portable path computes the same, slower", stacklevel=3)
