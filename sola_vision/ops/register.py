# SPDX-License-Identifier: Apache-2.0
"""Registration of the operators: one schema each, for which the dispatcher chooses the kernel.

`sola::wkv`, `sola::wkv_with_states` and `sola::wkv_backward` have the portable form as their default kernel; compiled
kernels for CPU and Triton kernels for CUDA override it where available. `sola::wkv_portable` and its two counterparts
are the same operators without those kernels: `ops.use("portable")` selects them. If an input requires gradients,
autograd calls the operator with states, which also returns the scan states at the chunk boundaries for the backward of
the same kernel. Fake tensors, autograd, autocast and the FLOPs formula are registered once for both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sola_vision.ops import autocast, gpu, gpu_passes, linear, passes, portable, softmax
from sola_vision.ops.arguments import register_fake

library = torch.library.Library("sola", "DEF")

_INPUTS = "Tensor decay, Tensor bonus, Tensor key, Tensor value"
_FORWARD = f"({_INPUTS}) -> Tensor"
_WITH_STATES = f"({_INPUTS}) -> (Tensor, Tensor)"
_BACKWARD = f"({_INPUTS}, Tensor states, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)"
_CPU_CHUNK = 32  # tokens, as in csrc/wkv.h


def _new_states(key: Tensor, value: Tensor) -> Tensor:
    """Allocate the states of the device's kernel; empty in float64, which has no kernel. Meta tensors count as CPU."""
    batch, num_tokens, channels = key.shape
    if torch.float64 in (key.dtype, value.dtype) or key.device.type not in ("cpu", "cuda", "meta"):
        size: tuple[int, ...] = (0,)
    elif key.device.type == "cuda":
        size = (gpu.states_size(batch, num_tokens, channels),)
    else:
        size = (batch, -(-num_tokens // _CPU_CHUNK), 4, channels)
    return key.new_empty(size, dtype=torch.float32)


def _portable_with_states(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return portable.wkv(decay, bonus, key, value), _new_states(key, value).fill_(float("nan"))


def _portable_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, _: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return portable.wkv_backward(decay, bonus, key, value, grad)


def _fake_forward(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _fake_with_states(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_forward(decay, bonus, key, value), _new_states(key, value)


def _fake_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, states: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (decay, bonus, key, value))
    return gw, gu, gk, gv


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as the gradient of the states


def _forward_cost(decay: Any, bonus: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count 29 N C multiply-adds as two operations each, like FlopCounterMode."""
    # not in the paper: how it counts the operator; 29 N C is Vision-RWKV's convention
    batch, num_tokens, channels = key
    return 2 * 29 * batch * num_tokens * channels


def _backward_cost(decay: Any, bonus: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # not in the paper: twice the forward, as for a matrix product
    return 2 * _forward_cost(decay, bonus, key, value)


def _define(name: str) -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    for suffix, schema, default, fake, cost in (
        ("", _FORWARD, portable.wkv, _fake_forward, _forward_cost),
        ("_with_states", _WITH_STATES, _portable_with_states, _fake_with_states, _forward_cost),
        ("_backward", _BACKWARD, _portable_backward, _fake_backward, _backward_cost),
    ):
        library.define(name + suffix + schema, tags=tags)
        library.impl(name + suffix, default, "CompositeExplicitAutograd")
        register_fake(library, name + suffix, fake)
        register_flop_formula(getattr(torch.ops.sola, name + suffix))(cost)
    forward, with_states, backward = (getattr(torch.ops.sola, name + s) for s in ("", "_with_states", "_backward"))

    def differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        decay, bonus, key, value, states = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward, which needs ATen operators
            return portable.wkv_backward(decay, bonus, key, value, grad)
        return backward(decay, bonus, key, value, states, grad)

    def differentiable(*inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return with_states(*inputs)[0]
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*inputs)

    torch.library.register_autograd(f"sola::{name}_with_states", differentiate, setup_context=_save, lib=library)
    library.impl(name, differentiable, "Autograd")
    for operator in (forward, with_states):
        # only key and value: w may be too large for half precision
        autocast.register(library, operator.__name__, operator, (2, 3))


for _name in ("wkv", "wkv_portable"):
    _define(_name)
passes.register(library)
gpu_passes.register(library)
linear.register(library)
softmax.register(library)
