# SPDX-License-Identifier: Apache-2.0
"""Launching Triton kernels without losing more time on the host than they take on the device.

Triton looks at every argument of every launch to find the binary that it compiled for such arguments, and eager
networks wait for it (docs/performance.md). What decides here is known: dtypes, constants and alignment.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_binaries: dict[Any, Any] = {}
_ALIGNED = 16  # bytes: what Triton makes a difference by
_INT32 = 2**31
_AMD = torch.version.hip is not None  # whose kernels are compiled for storages below or beyond 2 GiB, too


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: dict[str, int],
    options: dict[str, Any],
) -> None:
    """kernel(*tensors, *numbers, *constants), in this order, on the tensors' device, which is the current one. A kernel
    lives as long as the process and always comes with the same options for the same constants.
    """
    grid = (programs, 1, 1)
    addresses, dtypes = [], []
    for tensor in tensors:
        address = tensor.data_ptr()
        if address % _ALIGNED or (_AMD and tensor.untyped_storage().nbytes() >= _INT32):
            kernel[grid](*tensors, *numbers, **constants, **options)
            return
        addresses.append(address)
        dtypes.append(tensor.dtype)
    values = tuple(constants.values())
    kinds = [(n == 1, n % _ALIGNED == 0, n >= _INT32) for n in numbers]  # Triton makes kernels of their own for these
    device = tensors[0].get_device()
    key = (id(kernel), device, *dtypes, *kinds, *values, options.get("maxnreg"))
    binary = _binaries.get(key)
    if binary is None:
        # None in the interpreter, which has no binaries
        binary = _binaries[key] = kernel[grid](*tensors, *numbers, **constants, **options) or kernel
    elif binary is kernel:
        kernel[grid](*tensors, *numbers, **constants, **options)
    else:
        # addresses instead of tensors: a binary would ask every tensor for its own, and the driver whether it is one
        binary[grid](*addresses, *numbers, *values)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one; nothing where it is that already, or no GPU at all."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)
