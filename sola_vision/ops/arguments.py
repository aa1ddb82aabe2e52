# SPDX-License-Identifier: Apache-2.0
"""Validation of the operators' arguments, the same on every path: without it the plain forms would broadcast and the
dispatcher would run a fake kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_kind(operator: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are dense and of a supported dtype, ValueError unless on the same device."""
    device = next(iter(tensors.values())).device
    for x in tensors.values():  # a plain loop: it runs in every call of every operator
        if x.layout is not torch.strided or x.is_nested or x.dtype not in _DTYPES or x.device != device:
            raise _wrong_kind(operator, tensors)


def _wrong_kind(operator: str, tensors: dict[str, Tensor]) -> Exception:
    given, names = tensors.values(), _enumerate(list(tensors))
    if any(x.is_nested or x.layout is not torch.strided for x in given):
        return TypeError(f"{operator}: {names} must be dense tensors, neither sparse nor nested; convert them")
    if any(x.dtype not in _DTYPES for x in given):
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in given)
        return TypeError(f"{operator}: {names} must be float64, float32, bfloat16 or float16, got {dtypes}")
    devices = ", ".join(str(x.device) for x in given)
    return ValueError(f"{operator}: {names} must be on one device, got {devices}")


def check_same_shape(operator: str, **tensors: Tensor) -> None:
    """Like `check_kind`; also raise ValueError unless all shapes are equal."""
    check_kind(operator, **tensors)
    shape = next(iter(tensors.values())).shape
    for x in tensors.values():
        if x.shape != shape:
            shapes = ", ".join(f"{name} {size(x)}" for name, x in tensors.items())
            raise ValueError(f"{operator}: all arguments must have the same shape, got {shapes}")


def check_wkv(operator: str, decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> None:
    """Like `check_kind`; also raise ValueError unless decay and bonus are [C], key and value [B, N, C]."""
    check_kind(operator, decay=decay, bonus=bonus, key=key, value=value)
    if key.ndim != 3 or key.shape != value.shape:
        raise ValueError(f"{operator}: key {size(key)} and value {size(value)} must have the same shape [B, N, C]")
    channels = key.shape[2]
    if decay.ndim != 1 or bonus.ndim != 1 or decay.shape[0] != channels or bonus.shape[0] != channels:
        raise ValueError(
            f"{operator}: decay {size(decay)} and bonus {size(bonus)} must both be [C] = [{channels}], "
            f"the channels of key {size(key)}"
        )


def register_fake(library: torch.library.Library, name: str, fake: Callable[..., Any]) -> None:
    """Register a fake kernel for `sola::name` that raises ValueError unless all tensors are on one device. A single
    tensor on meta, such as a weight that was never loaded, makes the dispatcher call the fake kernel, which would
    return uninitialized memory.
    """

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        flat = [x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])]
        devices = dict.fromkeys(str(x.device) for x in flat if isinstance(x, Tensor))
        if len(devices) > 1:
            raise ValueError(f"sola::{name}: all tensors must be on one device, got {', '.join(devices)}")
        return fake(*arguments)

    torch.library.register_fake(f"sola::{name}", checked, lib=library)


def size(x: Tensor) -> str:
    """Format the shape of x for a message."""
    return str(list(x.shape))


def _enumerate(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
