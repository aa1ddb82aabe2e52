# SPDX-License-Identifier: Apache-2.0
"""The halves of a linear layer on a GPU, one node of autograd each.

An eager network waits there for the host, whose time goes by calls: an operator that autograd records, a view, a
conversion by autocast each cost it as much as a launch, forward and backward. So a half calls its kernels one after the
other on rows of channels, and its backward is written out. What it computes is what `LinearMixer` and `ChannelMix`
compute otherwise. T tokens of all images, N of one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sola_vision import ops
from sola_vision.layers.plain import hooked_everywhere, is_plain
from sola_vision.ops.again import differentiable_backward, in_plain_steps
from sola_vision.ops.autocast import autocast_dtype, kernels_only

_op = torch.ops.sola


def in_one_node(x: Tensor, norm: nn.LayerNorm, *projections: nn.Linear) -> bool:
    """Whether a half of x [B, H, W, C] is a node of its own: compilers, tracers and who pins a path want to see what it
    does, changed modules have to be called, and float64 has no kernels.
    """
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # first: compilers cannot follow what is below
        and type(x) is Tensor
        and x.is_cuda
        and x.dtype != torch.float64
        and ops.missing_kernel("cuda") is None
        and ops.pinned() in (None, "native")
        and not (ops.seen_through(x) or ops.tangents())
        and is_plain(norm, *projections)
        and not hooked_everywhere()
        and (torch.is_autocast_enabled("cuda") or all(projection.weight.dtype == x.dtype for projection in projections))
    )


def spatial_mix(
    x: Tensor,
    norm: nn.LayerNorm,
    decay: Tensor,
    bonus: Tensor,
    mixes: Sequence[Tensor],
    projections: Sequence[nn.Linear],
) -> tuple[Tensor, Tensor]:
    """The first half of x [B, H, W, C], before its norm and without its residual, and the read-out: both like x, in the
    dtype of products. mixes and projections: receptance, key, value; and the output's projection.
    """
    weights = (projection.weight for projection in projections)
    tensors = (x, norm.weight, norm.bias, decay, bonus, *mixes, *weights)
    if torch.is_grad_enabled():
        return _SpatialMix.apply(autocast_dtype(x), norm.eps, *tensors)
    with kernels_only():
        mixed, readout, *_ = _spatial_mix(autocast_dtype(x), norm.eps, *tensors)
    return mixed, readout


def channel_mix(
    x: Tensor, norm: nn.LayerNorm, mixes: Sequence[Tensor], projections: Sequence[nn.Linear], *, residual: bool
) -> Tensor:
    """The second half of x [B, H, W, C], before its norm: x plus it, or it alone in the dtype of products.
    mixes: key, receptance; projections: key, receptance, value.
    """
    weights = (projection.weight for projection in projections)
    tensors = (x, norm.weight, norm.bias, *mixes, *weights)
    if torch.is_grad_enabled():
        return _ChannelMix.apply(autocast_dtype(x), norm.eps, residual, *tensors)
    with kernels_only():
        return _channel_mix(autocast_dtype(x), norm.eps, residual, *tensors)[0]


def _spatial_mix(
    dtype: torch.dtype,
    eps: float,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    decay: Tensor,
    bonus: Tensor,
    *others: Tensor,
    keeps: bool = False,
) -> tuple[Tensor, ...]:
    """The half, the read-out, and what their backward needs: the operator's states too if it keeps them."""
    batch, height, width, channels = x.shape
    mixes, weights = torch.stack(others[:3]), torch.stack(others[3:]).to(dtype)
    shifted = _op.norm_shift.dtype(x, scale, shift, eps, mixes, 0, 0, dtype).flatten(1, 3)
    made = torch.bmm(shifted, weights[:3].mT)  # [3, T, C]
    receptance, key, value = made.view(3, batch, height * width, channels).unbind()
    if keeps:
        readout, states = _op.wkv_with_states.default(decay, bonus, key, value)
    else:
        readout, states = _op.wkv.default(decay, bonus, key, value), None
    gated = _op.gate.default(receptance, readout).flatten(0, 1)
    mixed = torch.mm(gated, weights[3].t())
    ends = (_shaped(mixed, x), _shaped(readout, x))
    return *ends, mixes, weights, shifted, receptance, key, value, gated, states


class _SpatialMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, eps: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        with kernels_only():
            mixed, readout, *kept = _spatial_mix(dtype, eps, *tensors, keeps=any(ctx.needs_input_grad))
        ctx.dtype, ctx.eps = dtype, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, readout, *kept)  # what is handed out itself: who changes it in place is told
        return mixed, readout

    @staticmethod
    def backward(ctx: Any, of_mixed: Tensor | None, of_read: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, shift, decay, bonus, *others = ctx.saved_tensors
        if in_plain_steps((of_mixed, of_read)):
            inputs, half = (x, scale, shift, decay, bonus, *others[:7]), partial(_spatial_mix, ctx.dtype, ctx.eps)
            return None, None, *differentiable_backward(half, inputs, (of_mixed, of_read))
        last, readout, mixes, weights, shifted, receptance, key, value, gated, states = others[6:]
        of_mixed = torch.zeros_like(gated) if of_mixed is None else of_mixed.reshape(gated.shape)
        with kernels_only():
            of_gated = torch.mm(of_mixed, weights[3]).view(key.shape)
            of_receptance, of_readout = _op.gate_backward.default(receptance, readout.view(key.shape), of_gated)
            if of_read is not None:
                of_readout += of_read.reshape(key.shape)
            of_wkv = _op.wkv_backward.default(decay, bonus, key, value, states, of_readout)
            of_decay, of_bonus, of_key, of_value = of_wkv
            rows = [grad.flatten(0, 1) for grad in (of_receptance, of_key, of_value)]
            of_shifted, of_weights = _products_backward(rows, shifted, weights, last.dtype)
            of_weights.append(_of_weight(of_mixed, gated, last.dtype))
            *of_norm, of_mixes = _op.norm_shift_backward.default(
                x, scale, shift, ctx.eps, mixes, of_shifted.view(3, *x.shape)
            )
        return None, None, *of_norm, of_decay, of_bonus, *of_mixes, *of_weights


def _channel_mix(
    dtype: torch.dtype, eps: float, residual: bool, x: Tensor, scale: Tensor, shift: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """The half, with or without its residual, and what its backward needs."""
    mixes, weights = torch.stack(others[:2]), [weight.to(dtype) for weight in others[2:]]
    shifted = _op.norm_shift.dtype(x, scale, shift, eps, mixes, 0, 0, dtype).flatten(1, 3)
    hidden, receptance = torch.mm(shifted[0], weights[0].t()), torch.mm(shifted[1], weights[1].t())
    squared = _op.squared_relu.default(hidden)
    value = torch.mm(squared, weights[2].t())
    rows = x.reshape(value.shape)
    out = ops.gated_sum(rows, receptance, value) if residual else _op.gate.default(receptance, value)
    return _shaped(out, x), mixes, shifted, hidden, receptance, squared, value, *weights


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, eps: float, residual: bool, *tensors: Tensor) -> Tensor:
        with kernels_only():
            out, *kept = _channel_mix(dtype, eps, residual, *tensors)
        ctx.dtype, ctx.eps, ctx.residual = dtype, eps, residual
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, *others = ctx.saved_tensors
        if in_plain_steps((grad,)):
            inputs, half = (x, scale, shift, *others[:5]), partial(_channel_mix, ctx.dtype, ctx.eps, ctx.residual)
            return None, None, None, *differentiable_backward(half, inputs, (grad,))
        last, mixes, shifted, hidden, receptance, squared, value, *weights = others[4:]
        with kernels_only():
            of_receptance, of_value = _op.gate_backward.default(receptance, value, grad.reshape(value.shape))
            of_hidden = _op.squared_relu_backward.default(hidden, torch.mm(of_value, weights[2]))
            of_shifted, of_weights = _products_backward((of_hidden, of_receptance), shifted, weights, last.dtype)
            of_weights.append(_of_weight(of_value, squared, last.dtype))
            of_x, *of_norm, of_mixes = _op.norm_shift_backward.default(
                x, scale, shift, ctx.eps, mixes, of_shifted.view(2, *x.shape)
            )
            if ctx.residual:
                of_x += grad
        return None, None, None, of_x, *of_norm, *of_mixes, *of_weights


def _shaped(made: Tensor, x: Tensor) -> Tensor:
    """A result in the shape of x; no view in autograd's eyes, so that it may be changed in place."""
    return torch.ops.aten._unsafe_view(made, x.shape)


def _products_backward(
    rows: Sequence[Tensor], shifted: Tensor, weights: Sequence[Tensor] | Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of shifted [M, T, C] and of the first M weights, which multiply it, from the results' [T, D]."""
    of_shifted = torch.empty_like(shifted)
    of_weights = []
    for row, part, weight, of_part in zip(rows, shifted, weights, of_shifted, strict=False):
        torch.mm(row, weight, out=of_part)
        of_weights.append(_of_weight(row, part, dtype))
    return of_shifted, of_weights


def _of_weight(rows: Tensor, made: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight [D, K] in its dtype, from the product's [T, D] and what was multiplied [T, K]."""
    if rows.dtype == dtype:
        return torch.mm(rows.t(), made)
    if rows.is_cuda and dtype == torch.float32:
        return torch.mm(rows.t(), made, out_dtype=dtype)  # never rounded to half precision
    return torch.mm(rows.t(), made).to(dtype)
