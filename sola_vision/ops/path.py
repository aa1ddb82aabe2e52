# SPDX-License-Identifier: Apache-2.0
"""Selection of the path that computes an operator: torch's dispatcher chooses, unless `use` pins one."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Path = Literal["reference", "portable", "native"]

_blocks: dict[object, Path] = {}  # the open blocks of `use`, in the order of opening; threads close theirs in any
_pinned: Path | None = None  # by the last of them
_lock = Lock()


@contextmanager
def use(path: Path) -> Iterator[None]:
    """Pin the path of every operator inside the block (for the whole process): "reference" and "portable" are plain
    torch, "native" is the compiled kernels. Softmax attention without a kernel uses torch's own on every path.

    Raises ValueError for another name; with "native", an operator raises RuntimeError if its device has no kernel.
    """
    global _pinned
    if path not in get_args(Path):
        raise ValueError(f"ops.use({path!r}): the path must be one of {', '.join(map(repr, get_args(Path)))}")
    block = object()
    with _lock:
        _blocks[block] = _pinned = path
    try:
        yield
    finally:
        with _lock:
            del _blocks[block]
            _pinned = next(reversed(_blocks.values()), None)


def pinned() -> Path | None:
    """Return the path pinned by `use`; None outside of it."""
    return _pinned


def transformed(*tensors: Tensor) -> bool:
    """True if a torch.func transform (grad, vmap, jvp, ...) is active or a tensor carries a forward-mode tangent. Both
    need ATen operators; a tangent would be dropped silently.
    """
    if torch._C._are_functorch_transforms_active():  # torch.compile can trace this call
        return True
    if torch.compiler.is_compiling():
        return False
    # unpacking is slow, and without a dual level no tangents exist
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x)[1] is not None for x in tensors)


def tangents() -> bool:
    """True inside a forward-mode dual level, where any tensor may carry a tangent."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def seen_through(*tensors: Tensor) -> bool:
    """True while ONNX export, torch.func or forward-mode differentiation is active, which need ATen operators only."""
    return exporting_onnx() or transformed(*tensors)


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """True while `torch.export` traces. torch.compile of torch 2.11 takes torch's own function for true everywhere."""
    return torch.compiler.is_exporting()


def exporting_onnx() -> bool:
    """True while `torch.onnx.export`, which translates ATen operators only, is tracing and no path is pinned."""
    # a cheap test first: export always traces
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced and _pinned is None and torch.onnx.is_in_onnx_export()
