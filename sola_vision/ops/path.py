# SPDX-License-Identifier: Apache-2.0
"""Which path computes an operator: torch's dispatcher decides, unless `use` has pinned one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Path = Literal["reference", "portable", "native"]

_pinned: Path | None = None


@contextmanager
def use(path: Path) -> Iterator[None]:
    """Pin the path of every operator inside the block (for the whole process): "reference" and "portable" are plain
    torch, "native" the compiled kernels. Softmax attention is torch's own where it has no kernel, whatever is pinned.

    Raises ValueError for another name and, with "native", RuntimeError at the call if no kernel exists for its device.
    """
    global _pinned
    if path not in get_args(Path):
        raise ValueError(f"ops.use({path!r}): the path is one of {', '.join(map(repr, get_args(Path)))}")
    before, _pinned = _pinned, path
    try:
        yield
    finally:
        _pinned = before


def pinned() -> Path | None:
    return _pinned


def transformed(*tensors: Tensor) -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) is at work or a tensor carries a forward-mode tangent: both see through
    torch's own operators only, and the tangent would be dropped without a word.
    """
    if torch._C._are_functorch_transforms_active():  # compilers ask this as well, and see the answer
        return True
    if torch.compiler.is_compiling():
        return False
    # no level, no tangents: unpacking is slow
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x)[1] is not None for x in tensors)


def tangents() -> bool:
    """Whether forward-mode differentiation is at work, where any tensor may carry a tangent."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def seen_through(*tensors: Tensor) -> bool:
    """Whether somebody looks who knows torch's own operators only: an exporter to ONNX, or what `transformed` names."""
    return exporting_onnx() or transformed(*tensors)


def exporting_onnx() -> bool:
    """Whether somebody's `torch.onnx.export` is looking, which knows torch's own operators only."""
    # asked first, and cheap: nobody exports without tracing
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced and _pinned is None and torch.onnx.is_in_onnx_export()
