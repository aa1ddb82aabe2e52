# SPDX-License-Identifier: Apache-2.0
"""Matrix products of an element-wise pass's output: linear(pass(inputs)).

The pass's output is as large as the product's and cheap to compute. Autograd would keep it for the weights' gradient;
on a CPU it is recomputed in the backward, which halves what a linear layer keeps. On a GPU autograd keeps it: there the
host's time for one more launch counts, and activation checkpointing saves memory if needed.

Where the CPU kernel multiplies, pass and products are one operator (`ops/linear.py`), in inference and in training.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sola_vision import ops
from sola_vision.layers.bands import BAND_BYTES, bands
from sola_vision.layers.dispatch import in_bands, in_tiles, multiplied_in_tiles, recomputed
from sola_vision.layers.products import product, product_into, project, weight_gradient
from sola_vision.layers.unmodified import is_affine
from sola_vision.ops.autocast import autocast_dtype
from sola_vision.ops.double_backward import differentiable_backward, needs_differentiable_backward
from sola_vision.ops.passes import gate_backward, interpolated, norm_shift_backward

_LARGEST_SUMS = 1 << 18  # elements of a weight's gradient that fit a core's second-level cache while it is summed


class Pass(NamedTuple):
    """An element-wise pass before products, of inputs [B, H, W, C] and parameters."""

    forward: Callable[..., Tensor]  # (*inputs, *parameters) -> the products' inputs, one part per projection
    backward: Callable[..., tuple[Tensor, ...]]  # (*inputs, *parameters, gradient of these) -> gradients of all
    # pass and products fused, in tiles: (*inputs, *parameters, *weights) -> results;
    # (*inputs, *parameters, *weights, *gradients of the results) -> gradients of all
    products: Callable[..., Tensor | Sequence[Tensor]] | None = None
    products_backward: Callable[..., Sequence[Tensor]] | None = None


def shift_linear(
    x: Tensor,
    norm: nn.LayerNorm,
    mixes: Tensor,
    projections: Sequence[nn.Linear],
    *,
    top: int = 0,
    bottom: int = 0,
) -> tuple[Tensor, ...]:
    """Layer norm, token shift, and a projection without bias for each row of mixes [M, C]: x [B, H, W, C] -> M results
    [B, H - top - bottom, W, D] (top, bottom: see ops.norm_shift).
    """
    if not is_affine(norm):
        shifted = interpolated(norm(x), mixes, top, bottom)
        return tuple(project(part, projection) for part, projection in zip(shifted, projections, strict=True))
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if top == bottom == 0 and in_tiles(x, norm, *projections):
        weights = [projection.weight for projection in projections]
        return tuple(torch.ops.sola.norm_shift_linear(x, weight, bias, eps, mixes, weights))
    if top == bottom == 0 and in_bands(x, norm, *projections):
        return _shift_linear_in_bands(x.contiguous(), weight, bias, eps, mixes, projections)

    # only the GPU's kernel can write another dtype than it reads; compilers fuse the conversion
    dtype = autocast_dtype(x) if x.is_cuda and not torch.compiler.is_compiling() else None

    def shift(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor) -> Tensor:
        return ops.norm_shift(x, weight, bias, eps, mixes, top=top, bottom=bottom, dtype=dtype)

    def backward(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return norm_shift_backward(x, weight, bias, eps, mixes, grad, top, bottom)

    def products(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, *weights: Tensor) -> list[Tensor]:
        return torch.ops.sola.norm_shift_linear(x, weight, bias, eps, mixes, weights)

    def products_backward(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, *others: Tensor) -> list[Tensor]:
        weights, grads = others[: len(projections)], others[len(projections) :]
        *others, grad_weights = torch.ops.sola.norm_shift_linear_backward(x, weight, bias, eps, mixes, weights, grads)
        return [*others, *grad_weights]

    fused = (products, products_backward) if top == bottom == 0 else ()
    return _linear(Pass(shift, backward, *fused), (x,), (weight, bias, mixes), projections)


def _shift_linear_in_bands(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, projections: Sequence[nn.Linear]
) -> tuple[Tensor, ...]:
    outs = tuple(x.new_empty((*x.shape[:3], projection.out_features)) for projection in projections)
    for band in bands(x, mixes.shape[0] * x.shape[3]):
        near = band.with_neighbours(x)
        shifted = ops.norm_shift(near, weight, bias, eps, mixes, top=band.top, bottom=band.bottom)
        for part, projection, out in zip(shifted, projections, outs, strict=True):
            product_into(band.of(out).flatten(0, 2), part.flatten(0, 2), projection.weight)
    return outs


def gate_linear(receptance: Tensor, value: Tensor, projection: nn.Linear) -> Tensor:
    """linear(sigmoid(receptance) * value): [B, H, W, C] twice -> [B, H, W, D]."""
    if in_tiles(value, projection) and receptance.dtype == value.dtype:
        return torch.ops.sola.gate_linear(receptance, value, projection.weight)
    if in_bands(value, projection):
        receptance, value = receptance.contiguous(), value.contiguous()
        out = value.new_empty((*value.shape[:3], projection.out_features))
        for band in bands(value, value.shape[3]):
            gated = ops.gate(band.of(receptance), band.of(value))
            product_into(band.of(out).flatten(0, 2), gated.flatten(0, 2), projection.weight)
        return out

    def gate(receptance: Tensor, value: Tensor) -> Tensor:
        return ops.gate(receptance, value)[None]

    def backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return gate_backward(receptance, value, grad[0])

    fused = (torch.ops.sola.gate_linear, torch.ops.sola.gate_linear_backward)
    return _linear(Pass(gate, backward, *fused), (receptance, value), (), (projection,))[0]


def squared_relu_linear(hidden: Tensor, projection: nn.Linear) -> Tensor:
    """linear(relu(hidden)^2): [B, H, W, C] -> [B, H, W, D]."""

    def square(hidden: Tensor) -> Tensor:
        return ops.squared_relu(hidden)[None]

    def backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.sola.squared_relu_backward(hidden, grad[0]),)

    products, products_backward = torch.ops.sola.squared_relu_linear, torch.ops.sola.squared_relu_linear_backward
    return _linear(Pass(square, backward, products, products_backward), (hidden,), (), (projection,))[0]


def _linear(
    first: Pass,
    inputs: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    projections: Sequence[nn.Linear],
) -> tuple[Tensor, ...]:
    if recomputed(inputs[0], projections, *inputs[1:], *parameters):
        weights = [projection.weight for projection in projections]
        return _Linear.apply(first, len(inputs), len(parameters), *inputs, *parameters, *weights)
    passed = first.forward(*inputs, *parameters)
    # a single part as a view, because unbind's backward copies
    parts = passed.unbind() if len(projections) > 1 else (passed.view(passed.shape[1:]),)
    return tuple(project(part, projection) for part, projection in zip(parts, projections, strict=True))


class _Linear(torch.autograd.Function):
    """Weight i applied to part i of the pass's output for inputs [B, H, W, C] and parameters.

    On a CPU a few images at a time, so that the pass's output is still in the cache when it is multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Pass,
        num_inputs: int,
        num_parameters: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.first = first
        ctx.counts = num_inputs, num_parameters
        ctx.save_for_backward(*tensors)
        inputs, parameters, weights = _split(tensors, ctx.counts)
        if first.products is not None and multiplied_in_tiles(*inputs, *weights):
            results = first.products(*inputs, *parameters, *weights)
            return (results,) if isinstance(results, Tensor) else tuple(results)
        dtype = autocast_dtype(inputs[0])
        weights = [weight.to(dtype) for weight in weights]
        parts = _images(inputs[0])
        if len(parts) == 1:
            passed = first.forward(*inputs, *parameters)
            return tuple(product(part.to(dtype), weight) for part, weight in zip(passed, weights, strict=True))
        outs: list[Tensor] = []
        for images in parts:
            passed = first.forward(*(x[images] for x in inputs), *parameters)
            outs = outs or [
                passed.new_empty((len(inputs[0]), *passed.shape[2:-1], len(weight)), dtype=dtype) for weight in weights
            ]
            for part, weight, out in zip(passed, weights, outs, strict=True):
                product_into(out[images].flatten(0, -2), part.flatten(0, -2).to(dtype), weight)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing counts the accesses
        if needs_differentiable_backward(grads):
            computed = partial(_plain_linear, ctx.first, ctx.counts, grads[0].dtype)
            return None, None, None, *differentiable_backward(computed, tensors, grads)
        inputs, parameters, weights = _split(tensors, ctx.counts)
        if ctx.first.products_backward is not None and multiplied_in_tiles(*inputs, *weights, *grads) and _fit(weights):
            return None, None, None, *ctx.first.products_backward(*inputs, *parameters, *weights, *grads)
        dtype = grads[0].dtype  # under autocast the product and its gradient are in half precision
        casts = [weight.to(dtype) for weight in weights]
        # sums over parts of the batch are kept in float32 or better
        grad_weights = [torch.zeros_like(weight, dtype=_wide(weight)) for weight in weights]
        grad_parameters = [torch.zeros_like(parameter, dtype=_wide(parameter)) for parameter in parameters]
        grad_inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for images in _images(inputs[0]):
            some = [x[images] for x in inputs]
            passed = ctx.first.forward(*some, *parameters)
            grad_passed = torch.empty(passed.shape, dtype=dtype, device=passed.device)
            for part, grad, weight, grad_part, total in zip(
                passed, grads, casts, grad_passed, grad_weights, strict=True
            ):
                rows = grad[images].reshape(-1, len(weight))
                product_into(grad_part.flatten(0, -2), rows, weight.t())
                total += weight_gradient(rows, part.flatten(0, -2).to(dtype))
            partial_grads = ctx.first.backward(*some, *parameters, grad_passed.to(passed.dtype))
            for whole, grad in zip(grad_inputs, partial_grads[: len(inputs)], strict=True):
                whole[images] = grad
            for total, grad in zip(grad_parameters, partial_grads[len(inputs) :], strict=True):
                total += grad
        sums = zip((*grad_parameters, *grad_weights), (*parameters, *weights), strict=True)
        return None, None, None, *grad_inputs, *(total.to(tensor.dtype) for total, tensor in sums)


def _plain_linear(first: Pass, counts: tuple[int, int], dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """`_Linear` in differentiable operations."""
    inputs, parameters, weights = _split(tensors, counts)
    passed = first.forward(*inputs, *parameters)
    return [linear(part.to(dtype), weight.to(dtype)) for part, weight in zip(passed, weights, strict=True)]


def _fit(weights: Sequence[Tensor]) -> bool:
    """True if a thread can sum their gradients in tiles: in float32, within its second-level cache."""
    return all(weight.dtype == torch.float32 and weight.numel() <= _LARGEST_SUMS for weight in weights)


def _split(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[Sequence[Tensor], ...]:
    inputs, parameters = counts
    return tensors[:inputs], tensors[inputs : inputs + parameters], tensors[inputs + parameters :]


def _images(x: Tensor) -> list[slice]:
    """Slices of a batch [B, H, W, C] that are processed one after the other."""
    if x.device.type != "cpu" or x.numel() == 0:
        return [slice(0, len(x))]
    size = max(1, BAND_BYTES // (x[0].numel() * x.element_size()))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
