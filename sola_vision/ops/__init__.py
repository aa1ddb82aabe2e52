# SPDX-License-Identifier: Apache-2.0
"""The Bi-WKV operator and the passes around it: `wkv` is eq. 9, `use` pins the path that computes it.

The paths: "reference" is the definition (`reference.py`, O(N^2)), "portable" is plain torch at linear cost
(`portable.py`), "native" is the compiled kernels (`cpu.py`, `gpu.py`). Without `use`, torch's dispatcher selects the
kernel for the tensors' device and falls back to the portable form if none exists. A backward uses the path of its
forward. `torch.onnx.export` traces matrix products (`onnx_form.py`); torch.func and forward-mode differentiation use
the portable form.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from sola_vision.ops import cpu, gpu, onnx_form, portable, reference, register
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
    """Bidirectional WKV attention, eq. 9: in each channel, the output of token t is the mean of the values v_i,
    weighted by the softmax over i of

        k_i - (|t - i| - 1) w / N   for i != t,   and   u + k_t   for i = t.

    decay w [C] (divided by N here), bonus u [C], key and value [B, N, C] -> [B, N, C] in value's dtype, which is
    float64, float32, bfloat16 or float16; decay and bonus may be float32 when key and value are half precision.
    The cost is linear in N. Double backward differentiates the portable form.
    Raises ValueError if shapes or devices do not match, TypeError for unsupported dtypes.
    """
    check_wkv("wkv", decay, bonus, key, value)
    if exporting_onnx():
        return onnx_form.wkv(decay, bonus, key, value)
    if pinned() == "reference":
        return reference.wkv(decay, bonus, key, value)
    if transformed(decay, bonus, key, value):
        # the scans write to buffers created from key and value: under vmap both must be batched if any input is
        zero = torch.zeros_like(decay + key + value)
        return portable.wkv(decay, bonus, key + zero.to(key.dtype), value + zero.to(value.dtype))
    if pinned() == "portable":
        return torch.ops.sola.wkv_portable(decay, bonus, key, value)
    if pinned() == "native":
        reason = missing_kernel(key.device.type)
        if reason is not None:
            raise RuntimeError(f'ops.use("native"): {reason}')
    elif not torch.compiler.is_compiling():
        _warn_once(key.device.type)
    return torch.ops.sola.wkv(decay, bonus, key, value)


def missing_kernel(device: str) -> str | None:
    """Return the reason why a device type such as "cpu" or "cuda" has no compiled kernel; None if it has one."""
    if device == "cpu":
        return cpu.load()
    if device == "cuda":
        return gpu.missing()
    return f"no compiled kernel for {device}"


@cache
def _warn_once(device: str) -> None:
    reason = missing_kernel(device) if device != "meta" else None
    if reason is not None:
        warnings.warn(f"sola_vision: {reason}; using the portable path, which is slower", stacklevel=3)
