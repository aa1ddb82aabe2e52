# SPDX-License-Identifier: Apache-2.0
"""Layer norm, residual sum and the two halves of a linear layer as one autograd node each, for eager mode on a GPU.

There the network is limited by the host's time per call: every recorded operator, view and autocast conversion costs
as much as a kernel launch, forward and backward. So a node launches its kernels one after the other on rows of
channels, and its backward is written out. The results are those of `LinearMixer` and `ChannelMix`. T counts the tokens
of all images, N those of one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sola_vision.ops.autocast import autocast_dtype, kernels_only
from sola_vision.ops.double_backward import differentiable_backward, needs_differentiable_backward

_op = torch.ops.sola


def spatial_mix(
    x: Tensor,
    norm: nn.LayerNorm,
    decay: Tensor,
    bonus: Tensor,
    mixes: Sequence[Tensor],
    projections: Sequence[nn.Linear],
    *,
    residual: bool,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of a layer: x [B, H, W, C] before its norm -> x plus the branch's output, whose images factors [B]
    multiply if given, or without `residual` the output alone in the products' dtype; and the read-out in that dtype,
    both [B, H, W, C]. mixes: receptance, key, value; projections: the same and output.
    """
    weights = (projection.weight for projection in projections)
    tensors = (x, norm.weight, norm.bias, decay, bonus, *mixes, *weights)
    dtype = autocast_dtype(x)  # outside of the block below, in which autocast counts as disabled
    if torch.is_grad_enabled():
        return _SpatialMix.apply(dtype, norm.eps, residual, factors, *tensors)
    with kernels_only():
        out, readout, *_ = _spatial_mix(dtype, norm.eps, residual, factors, *tensors)
    return out, readout


def channel_mix(
    x: Tensor,
    norm: nn.LayerNorm,
    mixes: Sequence[Tensor],
    projections: Sequence[nn.Linear],
    *,
    residual: bool,
    factors: Tensor | None = None,
) -> Tensor:
    """The second half of a layer: x [B, H, W, C] before its norm -> x plus the branch's output, as in `spatial_mix`, or
    without `residual` the output alone. mixes: key, receptance; projections: key, receptance, value.
    """
    weights = (projection.weight for projection in projections)
    tensors = (x, norm.weight, norm.bias, *mixes, *weights)
    dtype = autocast_dtype(x)  # as above
    if torch.is_grad_enabled():
        return _ChannelMix.apply(dtype, norm.eps, residual, factors, *tensors)
    with kernels_only():
        return _channel_mix(dtype, norm.eps, residual, factors, *tensors)[0]


def residual_sum(x: Tensor, branch: Tensor, factors: Tensor | None) -> Tensor:
    """x + branch, both [B, ...], multiplied by factors [B] if given."""
    if torch.is_grad_enabled():
        return _ResidualSum.apply(x, branch, factors)
    with kernels_only():
        return _op.residual_sum.default(x, None, branch, factors)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., C] -> its layer norm; under autocast in float32, as torch's is."""
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    if torch.is_grad_enabled():
        return _LayerNorm.apply(dtype, eps, x, weight, bias)
    with kernels_only():
        return _op.layer_norm.default(x, weight, bias, eps, dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, eps: float, *tensors: Tensor) -> Tensor:
        ctx.dtype, ctx.eps = dtype, eps
        ctx.save_for_backward(*tensors)
        with kernels_only():
            return _op.layer_norm.default(*tensors, eps, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if needs_differentiable_backward((grad,)):
            plain = partial(_plain_layer_norm, ctx.dtype, ctx.eps)
            return None, None, *differentiable_backward(plain, ctx.saved_tensors, (grad,))
        with kernels_only():
            return None, None, *_op.layer_norm_backward.default(*ctx.saved_tensors, ctx.eps, grad)


def _plain_layer_norm(dtype: torch.dtype, eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    tensors = (x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype))
    return (nn.functional.layer_norm(*tensors, eps),)


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factors: Tensor | None) -> Tensor:
        ctx.dtypes = x.dtype, branch.dtype
        ctx.save_for_backward(factors)
        with kernels_only():
            return _op.residual_sum.default(x, None, branch, factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (factors,), (of_x, of_branch) = ctx.saved_tensors, ctx.dtypes
        return grad.to(of_x), _branch_gradient(grad, factors, of_branch), None


def _spatial_mix(
    dtype: torch.dtype,
    eps: float,
    residual: bool,
    factors: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    decay: Tensor,
    bonus: Tensor,
    *others: Tensor,
    keeps: bool = False,
) -> tuple[Tensor, ...]:
    """The half's two results and the tensors that the backward needs; with `keeps` the scan states too."""
    batch, height, width, channels = x.shape
    mixes, weights = torch.stack(others[:3]), _stacked(others[3:], dtype)
    shifted = _op.norm_shift.dtype(x, scale, shift, eps, mixes, 0, 0, dtype).flatten(1, 3)
    projected = torch.bmm(shifted, weights[:3].mT)  # [3, T, C]
    receptance, key, value = projected.view(3, batch, height * width, channels).unbind()
    if keeps:
        readout, states = _op.wkv_with_states.default(decay, bonus, key, value)
    else:
        readout, states = _op.wkv.default(decay, bonus, key, value), None
    gated = _op.gate.default(receptance, readout).flatten(0, 1)
    out = torch.mm(gated, weights[3].t())
    if residual:
        out = _sum(x.reshape(out.shape), None, out, factors)
    results = (_shaped(out, x), _shaped(readout, x))
    return *results, mixes, weights, shifted, receptance, key, value, gated, states


class _SpatialMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, eps: float, residual: bool, factors: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        with kernels_only():
            out, readout, *kept = _spatial_mix(dtype, eps, residual, factors, *tensors, keeps=any(ctx.needs_input_grad))
        ctx.dtype, ctx.eps, ctx.residual = dtype, eps, residual
        ctx.set_materialize_grads(False)
        # the returned read-out itself, so that autograd detects in-place changes of it
        ctx.save_for_backward(factors, *tensors, readout, *kept)
        return out, readout

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_read: Tensor | None) -> tuple[Tensor | None, ...]:
        factors, x, scale, shift, decay, bonus, *others = ctx.saved_tensors
        if needs_differentiable_backward((grad, grad_read)):
            inputs = (x, scale, shift, decay, bonus, *others[:7])
            half = partial(_spatial_mix, ctx.dtype, ctx.eps, ctx.residual, factors)
            return None, None, None, None, *differentiable_backward(half, inputs, (grad, grad_read))
        last, readout, mixes, weights, shifted, receptance, key, value, gated, states = others[6:]
        with kernels_only():
            if grad is None:
                grad_mixed = torch.zeros_like(gated)
            else:
                grad_mixed = _branch_gradient(grad, factors, gated.dtype).reshape(gated.shape)
            grad_gated = torch.mm(grad_mixed, weights[3]).view(key.shape)
            grad_receptance, grad_readout = _op.gate_backward.default(receptance, readout.view(key.shape), grad_gated)
            if grad_read is not None:
                grad_readout += grad_read.reshape(key.shape)
            grad_wkv = _op.wkv_backward.default(decay, bonus, key, value, states, grad_readout)
            grad_decay, grad_bonus, grad_key, grad_value = grad_wkv
            rows = [grad.flatten(0, 1) for grad in (grad_receptance, grad_key, grad_value)]
            grad_shifted, grad_weights = _products_backward(rows, shifted, weights, last.dtype)
            grad_weights.append(_weight_gradient(grad_mixed, gated, last.dtype))
            *grad_norm, grad_mixes = _norm_shift_backward(
                x, scale, shift, ctx.eps, mixes, grad_shifted, grad if ctx.residual else None
            )
        return None, None, None, None, *grad_norm, grad_decay, grad_bonus, *grad_mixes, *grad_weights


def _channel_mix(
    dtype: torch.dtype,
    eps: float,
    residual: bool,
    factors: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *others: Tensor,
) -> tuple[Tensor, ...]:
    """The half's result and the tensors that the backward needs."""
    mixes, weights = torch.stack(others[:2]), _converted(others[2:], dtype)
    shifted = _op.norm_shift.dtype(x, scale, shift, eps, mixes, 0, 0, dtype).flatten(1, 3)
    hidden, receptance = torch.mm(shifted[0], weights[0].t()), torch.mm(shifted[1], weights[1].t())
    squared = _op.squared_relu.default(hidden)
    value = torch.mm(squared, weights[2].t())
    rows = x.reshape(value.shape)
    out = _sum(rows, receptance, value, factors) if residual else _op.gate.default(receptance, value)
    return _shaped(out, x), mixes, shifted, hidden, receptance, squared, value, *weights


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, eps: float, residual: bool, factors: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        with kernels_only():
            out, *kept = _channel_mix(dtype, eps, residual, factors, *tensors)
        ctx.dtype, ctx.eps, ctx.residual = dtype, eps, residual
        ctx.save_for_backward(factors, *tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, x, scale, shift, *others = ctx.saved_tensors
        if needs_differentiable_backward((grad,)):
            inputs = (x, scale, shift, *others[:5])
            half = partial(_channel_mix, ctx.dtype, ctx.eps, ctx.residual, factors)
            return None, None, None, None, *differentiable_backward(half, inputs, (grad,))
        last, mixes, shifted, hidden, receptance, squared, value, *weights = others[4:]
        with kernels_only():
            operands = (receptance, value, grad.reshape(value.shape))
            if factors is None:
                grad_receptance, grad_value = _op.gate_backward.default(*operands)
            else:
                grad_receptance, grad_value = _op.gate_backward.scaled(*operands, factors)
            grad_hidden = _op.squared_relu_backward.default(hidden, torch.mm(grad_value, weights[2]))
            grad_shifted, grad_weights = _products_backward(
                (grad_hidden, grad_receptance), shifted, weights, last.dtype
            )
            grad_weights.append(_weight_gradient(grad_value, squared, last.dtype))
            *grad_norm, grad_mixes = _norm_shift_backward(
                x, scale, shift, ctx.eps, mixes, grad_shifted, grad if ctx.residual else None
            )
        return None, None, None, None, *grad_norm, *grad_mixes, *grad_weights


def _sum(residual: Tensor, receptance: Tensor | None, value: Tensor, factors: Tensor | None) -> Tensor:
    """The sum of a residual and a branch, which is gated if there is a receptance."""
    if not torch.is_grad_enabled():
        return _op.residual_sum.default(residual, receptance, value, factors)
    branch = value if receptance is None else _op.gate.default(receptance, value)  # differentiated in double backward
    return residual + (branch if factors is None else _multiplied(branch, factors))


def _branch_gradient(grad: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch in `dtype`, given that of its sum with the residual."""
    if factors is None:
        return grad.to(dtype)
    if needs_differentiable_backward((grad,)):
        return _multiplied(grad, factors).to(dtype)
    return _op.scaled.default(grad, factors, dtype)


def _multiplied(x: Tensor, factors: Tensor) -> Tensor:
    """The images that x [B or T, ...] consists of times their factors [B], by torch's operators."""
    repeated = factors.repeat_interleave(len(x) // max(1, len(factors)))
    return x * repeated.view(-1, *[1] * (x.ndim - 1))


def _norm_shift_backward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    mixes: Tensor,
    grad: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of x, scale, shift and mixes, given that of the shifted rows [M, T, C]; `residual` is another one
    of x.
    """
    arguments = (x, scale, shift, eps, mixes, grad.view(len(mixes), *x.shape))
    if residual is None:
        return _op.norm_shift_backward.default(*arguments)
    return _op.norm_shift_backward.residual(*arguments, residual)


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights [D, K] as one tensor in `dtype`, by one kernel, which autograd in double backward cannot follow."""
    if torch.is_grad_enabled():
        return torch.stack(tuple(weights)).to(dtype)
    copies = weights[0].new_empty((len(weights), *weights[0].shape), dtype=dtype)
    torch._foreach_copy_(copies.unbind(), list(weights))
    return copies


def _converted(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The weights in `dtype`, by one kernel as in `_stacked`."""
    if torch.is_grad_enabled() or weights[0].dtype == dtype:
        return [weight.to(dtype) for weight in weights]
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(copies, list(weights))
    return copies


def _shaped(result: Tensor, x: Tensor) -> Tensor:
    """`result` in the shape of x; not a view for autograd, so that it may be modified in place."""
    return torch.ops.aten._unsafe_view(result, x.shape)


def _products_backward(
    rows: Sequence[Tensor], shifted: Tensor, weights: Sequence[Tensor] | Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of shifted [M, T, C] and of the first M weights from the gradients `rows` [T, D] of their products."""
    grad_shifted = torch.empty_like(shifted)
    grad_weights = []
    for row, part, weight, grad_part in zip(rows, shifted, weights, grad_shifted, strict=False):
        torch.mm(row, weight, out=grad_part)
        grad_weights.append(_weight_gradient(row, part, dtype))
    return grad_shifted, grad_weights


def _weight_gradient(rows: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [D, K] of a weight in its dtype, from the product's gradient [T, D] and its input [T, K]."""
    if rows.dtype == dtype:
        return torch.mm(rows.t(), inputs)
    if rows.is_cuda and dtype == torch.float32:
        return torch.mm(rows.t(), inputs, out_dtype=dtype)  # summed and stored without rounding to half precision
    return torch.mm(rows.t(), inputs).to(dtype)
