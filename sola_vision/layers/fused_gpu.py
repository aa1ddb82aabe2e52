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

from sola_vision.ops import gpu_passes
from sola_vision.ops.autocast import KernelsOnly, autocast_dtype
from sola_vision.ops.double_backward import differentiable_backward, needs_differentiable_backward
from sola_vision.ops.passes import PLAIN

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
    assert residual or factors is None
    if torch.is_grad_enabled():
        return _SpatialMix.apply(dtype, norm.eps, residual, factors, *tensors)
    with KernelsOnly():
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
    assert residual or factors is None
    if torch.is_grad_enabled():
        return _ChannelMix.apply(dtype, norm.eps, residual, factors, *tensors)
    with KernelsOnly():
        return _channel_mix(dtype, norm.eps, residual, factors, *tensors)[0]


def residual_sum(x: Tensor, branch: Tensor, factors: Tensor | None) -> Tensor:
    """x + branch, both [B, ...], multiplied by factors [B] if given."""
    if torch.is_grad_enabled():
        return _ResidualSum.apply(x, branch, factors)
    with KernelsOnly():
        return _passes(x).residual_sum(x, None, branch, factors)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., C] -> its layer norm; under autocast in float32, as torch's is."""
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    if torch.is_grad_enabled():
        return _LayerNorm.apply(dtype, eps, x, weight, bias)
    with KernelsOnly():
        return _passes(x).layer_norm(x, weight, bias, eps, dtype)


def _passes(x: Tensor) -> Any:
    """The passes on tensors like x: their kernels, without the dispatcher, which takes the host about as long as a
    launch; or their definitions, where autograd records them (double backward) and in tests on a CPU.
    """
    return gpu_passes if x.is_cuda and not torch.is_grad_enabled() else PLAIN


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, eps: float, *tensors: Tensor) -> Tensor:
        ctx.dtype, ctx.eps = dtype, eps
        ctx.save_for_backward(*tensors)
        with KernelsOnly():
            return _passes(tensors[0]).layer_norm(*tensors, eps, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if needs_differentiable_backward((grad,)):

            def norm(*tensors: Tensor) -> tuple[Tensor]:
                return (PLAIN.layer_norm(*tensors, ctx.eps, ctx.dtype),)

            return None, None, *differentiable_backward(norm, ctx.saved_tensors, (grad,))
        with KernelsOnly():
            return None, None, *_passes(grad).layer_norm_backward(*ctx.saved_tensors, ctx.eps, grad)


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factors: Tensor | None) -> Tensor:
        ctx.dtypes = x.dtype, branch.dtype
        ctx.save_for_backward(factors)
        with KernelsOnly():
            return _passes(x).residual_sum(x, None, branch, factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (factors,), (of_x, of_branch) = ctx.saved_tensors, ctx.dtypes
        run = PLAIN if needs_differentiable_backward((grad,)) else _passes(grad)
        return grad.to(of_x), _branch_gradient(run, grad, factors, of_branch), None


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
    run = _passes(x)
    mixes, weights = torch.stack(others[:3]), _stacked(others[3:], dtype)
    shifted = run.norm_shift(x, scale, shift, eps, mixes, 0, 0, dtype).flatten(1, 3)
    projected = torch.bmm(shifted, weights[:3].mT)  # [3, T, C]
    receptance, key, value = projected.view(3, batch, height * width, channels).unbind()
    if keeps:
        readout, states = _op.wkv_with_states.default(decay, bonus, key, value)
    else:
        readout, states = _op.wkv.default(decay, bonus, key, value), None
    gated = run.gate(receptance, readout).flatten(0, 1)
    out = torch.mm(gated, weights[3].t())
    if residual:
        out = run.residual_sum(x.reshape(out.shape), None, out, factors)
    results = (_shaped(out, x), _shaped(readout, x))
    return *results, mixes, weights, shifted, receptance, key, value, gated, states


class _SpatialMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, eps: float, residual: bool, factors: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        with KernelsOnly():
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
        run = _passes(x)
        with KernelsOnly():
            if grad is None:
                grad_mixed = torch.zeros_like(gated)
            else:
                grad_mixed = _branch_gradient(run, grad, factors, gated.dtype).reshape(gated.shape)
            grad_gated = torch.mm(grad_mixed, weights[3]).view(key.shape)
            grad_receptance, grad_readout = run.gate_backward(receptance, readout.view(key.shape), grad_gated)
            if grad_read is not None:
                grad_readout += grad_read.reshape(key.shape)
            grad_wkv = _op.wkv_backward.default(decay, bonus, key, value, states, grad_readout)
            grad_decay, grad_bonus, grad_key, grad_value = grad_wkv
            rows = [grad.flatten(0, 1) for grad in (grad_receptance, grad_key, grad_value)]
            grad_shifted, grad_weights = _products_backward(rows, shifted, weights, last.dtype)
            grad_weights.append(_weight_gradient(grad_mixed, gated, last.dtype))
            residual, grad_shifted = grad if ctx.residual else None, grad_shifted.view(3, *x.shape)
            *grad_norm, grad_mixes = run.norm_shift_backward(x, scale, shift, ctx.eps, mixes, grad_shifted, residual)
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
    run = _passes(x)
    mixes, weights = torch.stack(others[:2]), _converted(others[2:], dtype)
    shifted = run.norm_shift(x, scale, shift, eps, mixes, 0, 0, dtype).flatten(1, 3)
    hidden, receptance = torch.mm(shifted[0], weights[0].t()), torch.mm(shifted[1], weights[1].t())
    squared = run.squared_relu(hidden)
    value = torch.mm(squared, weights[2].t())
    rows = x.reshape(value.shape)
    out = run.residual_sum(rows, receptance, value, factors) if residual else run.gate(receptance, value)
    return _shaped(out, x), mixes, shifted, hidden, receptance, squared, value, *weights


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, eps: float, residual: bool, factors: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        with KernelsOnly():
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
        run = _passes(x)
        with KernelsOnly():
            grad_receptance, grad_value = run.gate_backward(receptance, value, grad.reshape(value.shape), factors)
            grad_hidden = run.squared_relu_backward(hidden, torch.mm(grad_value, weights[2]))
            grad_shifted, grad_weights = _products_backward(
                (grad_hidden, grad_receptance), shifted, weights, last.dtype
            )
            grad_weights.append(_weight_gradient(grad_value, squared, last.dtype))
            residual, grad_shifted = grad if ctx.residual else None, grad_shifted.view(2, *x.shape)
            *grad_norm, grad_mixes = run.norm_shift_backward(x, scale, shift, ctx.eps, mixes, grad_shifted, residual)
        return None, None, None, None, *grad_norm, *grad_mixes, *grad_weights


def _branch_gradient(run: Any, grad: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch in `dtype`, given that of its sum with the residual."""
    return grad.to(dtype) if factors is None else run.scaled(grad, factors, dtype)


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
