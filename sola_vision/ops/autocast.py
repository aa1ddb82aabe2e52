# SPDX-License-Identifier: Apache-2.0
"""Autocast for operators that torch does not know: some of their tensors come in its dtype."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def autocasts(x: Tensor) -> bool:
    """Whether products of x are autocast's to convert."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Of a matrix product of x; float64 stays."""
    return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 and autocasts(x) else x.dtype


@contextmanager
def kernels_only() -> Iterator[None]:
    """Neither autograd nor autocast looks at what the block calls: for a node that has done their work itself."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_KEYS):
        yield


def register(library: torch.library.Library, name: str, operator: Any, positions: Sequence[int]) -> None:
    """The arguments at `positions` are converted, unless one of them is float64; the others stay as they are."""

    def on(device: str) -> Any:
        def call(_: Any, *arguments: Any) -> Any:
            given = list(arguments)
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                if all(given[at].dtype != torch.float64 for at in positions):
                    for at in positions:
                        given[at] = given[at].to(torch.get_autocast_dtype(device))
                return operator(*given)

        return call

    for dispatch_key, device in _DEVICES.items():
        library.impl(name, on(device), dispatch_key, with_keyset=True)
