# SPDX-License-Identifier: Apache-2.0
"""Autocast for custom operators: chosen arguments are cast to the autocast dtype."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def autocasts(x: Tensor) -> bool:
    """True if autocast is enabled for the device of x."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product of x under the current autocast state; float64 is never cast."""
    return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 and autocasts(x) else x.dtype


class KernelsOnly:
    """Dispatch the calls inside the block below autograd and autocast: for autograd nodes that do the work of both.

    A class, because a generator takes longer to enter and to leave.
    """

    def __enter__(self) -> None:
        self._guards = torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_KEYS)
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *error: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*error)


def register(library: torch.library.Library, name: str, operator: Any, positions: Sequence[int]) -> None:
    """Register autocast kernels that cast only the arguments at `positions`, unless one of these is float64."""

    def autocast_kernel(device: str) -> Any:
        def call(_: Any, *arguments: Any) -> Any:
            cast = list(arguments)
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                if all(cast[i].dtype != torch.float64 for i in positions):
                    for i in positions:
                        cast[i] = cast[i].to(torch.get_autocast_dtype(device))
                return operator(*cast)

        return call

    for dispatch_key, device in _DEVICES.items():
        library.impl(name, autocast_kernel(device), dispatch_key, with_keyset=True)


def register_plain(
    library: torch.library.Library, name: str, operator: Any, plain: Callable[..., Any], *, always: bool = False
) -> None:
    """Register a CPU autocast kernel that runs the plain form if dtypes differ, or `always`.

    Eager layers choose the plain form themselves; a graph that was captured without autocast calls the operator.
    """

    def call(_: Any, *arguments: Any) -> Any:
        dtypes = {x.dtype for x in arguments if isinstance(x, Tensor)}
        if always or len(dtypes) > 1:
            return plain(*arguments)
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return operator(*arguments)

    library.impl(name, call, "AutocastCPU", with_keyset=True)
