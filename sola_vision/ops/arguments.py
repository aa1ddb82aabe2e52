# SPDX-License-Identifier: Apache-2.0
"""What the operators refuse, on every path alike: the plain forms would broadcast, the dispatcher run a fake kernel."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_kind(operator: str, **tensors: Tensor) -> None:
    """Raises TypeError unless all are dense and of a dtype that the kernels know, ValueError unless on one device."""
    device = next(iter(tensors.values())).device
    for x in tensors.values():  # plain loops: every call of every operator waits for them
        if x.layout is not torch.strided or x.is_nested or x.dtype not in _DTYPES or x.device != device:
            raise _wrong_kind(operator, tensors)


def _wrong_kind(operator: str, tensors: dict[str, Tensor]) -> Exception:
    given, names = tensors.values(), _listed(list(tensors))
    if any(x.is_nested or x.layout is not torch.strided for x in given):
        return TypeError(f"{operator}: {names} must be dense tensors, neither sparse nor nested; convert them")
    if any(x.dtype not in _DTYPES for x in given):
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in given)
        return TypeError(f"{operator}: {names} must be float64, float32, bfloat16 or float16, got {dtypes}")
    devices = ", ".join(str(x.device) for x in given)
    return ValueError(f"{operator}: {names} must be on one device, got {devices}")


def check_same_shape(operator: str, **tensors: Tensor) -> None:
    """`check_kind`, and ValueError unless all have one shape."""
    check_kind(operator, **tensors)
    shape = next(iter(tensors.values())).shape
    for x in tensors.values():
        if x.shape != shape:
            shapes = ", ".join(f"{name} {size(x)}" for name, x in tensors.items())
            raise ValueError(f"{operator}: all must have one shape, got {shapes}")


def check_wkv(operator: str, decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> None:
    """`check_kind`, and ValueError unless decay and bonus are [C], key and value [B, N, C]."""
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
    """torch.library.register_fake for `sola::name`, and ValueError unless all tensors are on one device. A single one
    on meta, such as a weight that was never loaded, makes the dispatcher call the fake kernel for all, which would
    hand out memory that nothing has written.
    """

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        given = [x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])]
        devices = dict.fromkeys(str(x.device) for x in given if isinstance(x, Tensor))
        if len(devices) > 1:
            raise ValueError(f"sola::{name}: its tensors must be on one device, got {', '.join(devices)}")
        return fake(*arguments)

    torch.library.register_fake(f"sola::{name}", checked, lib=library)


def size(x: Tensor) -> str:
    return str(list(x.shape))


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
