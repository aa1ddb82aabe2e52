# SPDX-License-Identifier: Apache-2.0
"""The registered operators: one schema, and the dispatcher chooses the kernel.

`sola::wkv` and `sola::wkv_backward` have the portable form as their default kernel; a compiled kernel for CPU and a
Triton kernel for CUDA take over where they exist. `sola::wkv_portable` and its backward are the same without those
kernels: they are what `ops.use("portable")` pins. Fake tensors, autograd, autocast and the FLOPs formula are
registered once for both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sola_vision.ops import autocast, gpu_passes, linear, passes, portable, softmax
from sola_vision.ops.arguments import register_fake

library = torch.library.Library("sola", "DEF")

_FORWARD = "(Tensor decay, Tensor bonus, Tensor key, Tensor value) -> Tensor"
_BACKWARD = "(Tensor decay, Tensor bonus, Tensor key, Tensor value, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)"


def _fake_forward(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _fake_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (decay, bonus, key, value))
    return gw, gu, gk, gv


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _forward_cost(decay: Any, bonus: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """29 N C multiply-adds, Vision-RWKV's convention; FlopCounterMode counts two operations for each."""
    batch, num_tokens, channels = key
    return 2 * 29 * batch * num_tokens * channels


def _backward_cost(decay: Any, bonus: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # not in the paper: twice the forward, as for a matrix product
    return 2 * _forward_cost(decay, bonus, key, value)


def _define(name: str) -> None:
    library.define(name + _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
    library.define(name + "_backward" + _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, portable.wkv, "CompositeExplicitAutograd")
    library.impl(name + "_backward", portable.wkv_backward, "CompositeExplicitAutograd")
    register_fake(library, name, _fake_forward)
    register_fake(library, f"{name}_backward", _fake_backward)

    forward = getattr(torch.ops.sola, name)
    backward = getattr(torch.ops.sola, name + "_backward")

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # a backward that is to be differentiated again has to be torch's own operators
        chosen = portable.wkv_backward if torch.is_grad_enabled() else backward
        decay, bonus, key, value = ctx.saved_tensors
        return chosen(decay, bonus, key, value, grad)

    torch.library.register_autograd(f"sola::{name}", differentiate, setup_context=_save_inputs, lib=library)
    register_flop_formula(forward)(_forward_cost)
    register_flop_formula(backward)(_backward_cost)

    autocast.register(library, name, forward, (2, 3))  # key and value; decay and bonus stay, since w may be large


for _name in ("wkv", "wkv_portable"):
    _define(_name)
passes.register(library)
gpu_passes.register(library)
linear.register(library)
softmax.register(library)
