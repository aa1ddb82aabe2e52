# SPDX-License-Identifier: Apache-2.0
"""Autocast for operators that torch does not know: some of their tensors come in its dtype."""

from collections.abc import Sequence
from typing import Any

import torch

_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}


def register(library: torch.library.Library, name: str, operator: Any, positions: Sequence[int]) -> None:
    """The arguments at `positions` are converted, unless the last of them is float64; the others stay as they are."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def on(device: str) -> Any:
        def call(_: Any, *arguments: Any) -> Any:
            given = list(arguments)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                if given[positions[-1]].dtype != torch.float64:
                    for at in positions:
                        given[at] = given[at].to(torch.get_autocast_dtype(device))
                return operator(*given)

        return call

    for dispatch_key, device in _DEVICES.items():
        library.impl(name, on(device), dispatch_key, with_keyset=True)
