# SPDX-License-Identifier: Apache-2.0
"""Launch Triton kernels with less host time than the kernels take on the device.

Triton inspects every argument of every launch to look up the binary compiled for such arguments, which makes eager
networks host-bound (docs/performance-gpu.md). Here the key is known in advance: dtypes, constants and alignment. A
known binary is run as torch's Inductor does, without Triton's hooks, unless a profiler has set some.
"""

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_binaries: dict[Any, Any] = {}
_ALIGNED = 16  # bytes: the alignment that Triton specializes on
_INT32 = 2**31
_AMD = torch.version.hip is not None  # its kernels are also specialized on whether a storage is below 2 GiB


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: dict[str, int],
    options: dict[str, Any],
) -> None:
    """Launch kernel(*tensors, *numbers, *constants), in this order, on the tensors' device, which must be the current
    one. A kernel must live as long as the process and always be launched with the same options for the same constants.
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
    # the properties of an integer that Triton specializes a kernel on
    specializations = [(n == 1, n % _ALIGNED == 0, n >= _INT32) for n in numbers]
    device = tensors[0].get_device()
    key = (id(kernel), device, *dtypes, *specializations, *values, options.get("maxnreg"))
    binary = _binaries.get(key)
    if binary is None:
        # the interpreter has no binaries and returns None
        binary = _binaries[key] = kernel[grid](*tensors, *numbers, **constants, **options) or kernel
    elif binary is kernel:
        kernel[grid](*tensors, *numbers, **constants, **options)
    else:
        # addresses instead of tensors: for a tensor the launcher reads its pointer and checks it with the driver
        arguments = (*addresses, *numbers, *values)
        driver, hooks = _triton()
        if _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook):
            binary[grid](*arguments)
        else:
            stream = driver.active.get_current_stream(device)
            launching = (stream, binary.function, binary.packed_metadata, None, None, None)
            binary.run(*grid, *launching, *arguments)


@cache
def _triton() -> tuple[Any, Any]:
    """Triton's driver and its settings of launches."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def _is_set(hook: Any) -> bool:
    """True if a hook of Triton, a chain of functions, has any."""
    return bool(getattr(hook, "calls", hook))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context manager that makes the tensor's device the current one; a no-op if it already is, or is not a GPU."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)
