# SPDX-License-Identifier: Apache-2.0
"""Matrix products of what an element-wise pass makes: linear(pass(inputs)).

The pass's result is as large as the product's and cheap to compute. Autograd would keep it for the weights' gradient;
on a CPU it is computed again in the backward, so that a linear layer keeps about half as much. On a GPU autograd does
keep it: there the host's time for one more launch counts, and activation checkpointing is for those who lack memory.

Where the CPU kernel multiplies, pass and products are one operator (`ops/linear.py`), in inference and in training.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sola_vision import ops
from sola_vision.layers.bands import BAND_BYTES, bands, in_bands, in_tiles, multiplied_in_tiles
from sola_vision.layers.plain import is_affine, is_plain
from sola_vision.layers.products import product, product_into, project, weight_gradient
from sola_vision.ops.again import differentiable_backward, in_plain_steps
from sola_vision.ops.autocast import autocast_dtype, autocasts
from sola_vision.ops.passes import gate_backward, interpolated, norm_shift_backward

_LARGEST_SUMS = 1 << 18  # numbers of a weight's gradient that stay in a core's second-level cache while they are summed


class Pass(NamedTuple):
    """An element-wise pass before products, of inputs [B, H, W, C] and parameters."""

    make: Callable[..., Tensor]  # (*inputs, *parameters) -> what is multiplied, one part for each projection
    backward: Callable[..., tuple[Tensor, ...]]  # (*inputs, *parameters, gradient of that) -> gradients of all
    # the same with the products, in tiles: (*inputs, *parameters, *weights) -> their results, and from those and the
    # gradients of the results to the gradients of all
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
    """Layer norm, token shift and a projection without bias for each of mixes [M, C]: x [B, H, W, C] -> M results
    [B, H - top - bottom, W, D] (see ops.norm_shift).
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

    # only the GPU's kernel writes another dtype than it reads; compilers fuse the conversion
    dtype = autocast_dtype(x) if x.is_cuda and not torch.compiler.is_compiling() else None

    def shift(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor) -> Tensor:
        return ops.norm_shift(x, weight, bias, eps, mixes, top=top, bottom=bottom, dtype=dtype)

    def backward(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return norm_shift_backward(x, weight, bias, eps, mixes, grad, top, bottom)

    def products(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, *weights: Tensor) -> list[Tensor]:
        return torch.ops.sola.norm_shift_linear(x, weight, bias, eps, mixes, weights)

    def products_backward(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, *others: Tensor) -> list[Tensor]:
        weights, grads = others[: len(projections)], others[len(projections) :]
        *found, of_weights = torch.ops.sola.norm_shift_linear_backward(x, weight, bias, eps, mixes, weights, grads)
        return [*found, *of_weights]

    tiled = (products, products_backward) if top == bottom == 0 else ()
    return _linear(Pass(shift, backward, *tiled), (x,), (weight, bias, mixes), projections)


def _shift_linear_in_bands(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, projections: Sequence[nn.Linear]
) -> tuple[Tensor, ...]:
    made = tuple(x.new_empty((*x.shape[:3], projection.out_features)) for projection in projections)
    for band in bands(x, mixes.shape[0] * x.shape[3]):
        near = band.with_neighbours(x)
        shifted = ops.norm_shift(near, weight, bias, eps, mixes, top=band.top, bottom=band.bottom)
        for part, projection, out in zip(shifted, projections, made, strict=True):
            product_into(band.of(out).flatten(0, 2), part.flatten(0, 2), projection.weight)
    return made


def gate_linear(receptance: Tensor, value: Tensor, projection: nn.Linear) -> Tensor:
    """linear(sigmoid(receptance) * value): [B, H, W, C] twice -> [B, H, W, D]."""
    if in_tiles(value, projection) and receptance.dtype == value.dtype:
        return torch.ops.sola.gate_linear(receptance, value, projection.weight)
    if in_bands(value, projection):
        receptance, value = receptance.contiguous(), value.contiguous()
        made = value.new_empty((*value.shape[:3], projection.out_features))
        for band in bands(value, value.shape[3]):
            gated = ops.gate(band.of(receptance), band.of(value))
            product_into(band.of(made).flatten(0, 2), gated.flatten(0, 2), projection.weight)
        return made

    def gate(receptance: Tensor, value: Tensor) -> Tensor:
        return ops.gate(receptance, value)[None]

    def backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return gate_backward(receptance, value, grad[0])

    of_gate = Pass(gate, backward, torch.ops.sola.gate_linear, torch.ops.sola.gate_linear_backward)
    return _linear(of_gate, (receptance, value), (), (projection,))[0]


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
    # compilers choose themselves what to compute again, and plain torch is to be seen where a path is pinned, by
    # tracers and exporters, and by transforms such as torch.func's
    pays = not inputs[0].is_cuda and torch.is_grad_enabled()
    pays = pays and not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and ops.pinned() in (None, "native")
    weights = [projection.weight for projection in projections] if pays and is_plain(*projections) else []
    # weights of another dtype than what they multiply are autocast's to convert; without it `linear` refuses them
    fit = all(w.dtype == inputs[0].dtype for w in weights) or (
        autocasts(inputs[0]) and inputs[0].dtype != torch.float64
    )
    if weights and fit and not ops.seen_through(*inputs, *parameters, *weights):
        return _Linear.apply(first, len(inputs), len(parameters), *inputs, *parameters, *weights)
    made = first.make(*inputs, *parameters)
    # a single part as a view: what is unbound has its gradients copied together
    parts = made.unbind() if len(projections) > 1 else (made.view(made.shape[1:]),)
    return tuple(project(part, projection) for part, projection in zip(parts, projections, strict=True))


class _Linear(torch.autograd.Function):
    """Matrix i applied to part i of what `make` makes of inputs [B, H, W, C] and parameters.

    On a CPU a few images at a time, so that what is made is still in the cache when it is multiplied.
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
            found = first.products(*inputs, *parameters, *weights)
            return (found,) if isinstance(found, Tensor) else tuple(found)
        dtype = autocast_dtype(inputs[0])
        weights = [weight.to(dtype) for weight in weights]
        parts = _images(inputs[0])
        if len(parts) == 1:
            made = first.make(*inputs, *parameters)
            return tuple(product(part.to(dtype), weight) for part, weight in zip(made, weights, strict=True))
        results: list[Tensor] = []
        for images in parts:
            made = first.make(*(x[images] for x in inputs), *parameters)
            results = results or [
                made.new_empty((len(inputs[0]), *made.shape[2:-1], len(weight)), dtype=dtype) for weight in weights
            ]
            for part, weight, result in zip(made, weights, results, strict=True):
                product_into(result[images].flatten(0, -2), part.flatten(0, -2).to(dtype), weight)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing counts
        if in_plain_steps(grads):
            computed = partial(_plain_linear, ctx.first, ctx.counts, grads[0].dtype)
            return None, None, None, *differentiable_backward(computed, tensors, grads)
        inputs, parameters, weights = _split(tensors, ctx.counts)
        if ctx.first.products_backward is not None and multiplied_in_tiles(*inputs, *weights, *grads) and _fit(weights):
            return None, None, None, *ctx.first.products_backward(*inputs, *parameters, *weights, *grads)
        dtype = grads[0].dtype  # under autocast the product was in half precision, and so is its gradient
        casts = [weight.to(dtype) for weight in weights]
        # sums over parts of the batch are kept in float32 or better
        of_weights = [torch.zeros_like(weight, dtype=_wide(weight)) for weight in weights]
        of_parameters = [torch.zeros_like(parameter, dtype=_wide(parameter)) for parameter in parameters]
        of_inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for images in _images(inputs[0]):
            some = [x[images] for x in inputs]
            made = ctx.first.make(*some, *parameters)
            grad_made = torch.empty(made.shape, dtype=dtype, device=made.device)
            for part, grad, weight, grad_part, total in zip(made, grads, casts, grad_made, of_weights, strict=True):
                rows = grad[images].reshape(-1, len(weight))
                product_into(grad_part.flatten(0, -2), rows, weight.t())
                total += weight_gradient(rows, part.flatten(0, -2).to(dtype))
            found = ctx.first.backward(*some, *parameters, grad_made.to(made.dtype))
            for whole, grad in zip(of_inputs, found[: len(inputs)], strict=True):
                whole[images] = grad
            for total, grad in zip(of_parameters, found[len(inputs) :], strict=True):
                total += grad
        sums = zip((*of_parameters, *of_weights), (*parameters, *weights), strict=True)
        return None, None, None, *of_inputs, *(total.to(tensor.dtype) for total, tensor in sums)


def _plain_linear(first: Pass, counts: tuple[int, int], dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """What `_Linear` computes, in steps that autograd knows."""
    inputs, parameters, weights = _split(tensors, counts)
    made = first.make(*inputs, *parameters)
    return [linear(part.to(dtype), weight.to(dtype)) for part, weight in zip(made, weights, strict=True)]


def _fit(weights: Sequence[Tensor]) -> bool:
    """Whether a thread can sum their gradients in tiles: in float32, and within its second-level cache."""
    return all(weight.dtype == torch.float32 and weight.numel() <= _LARGEST_SUMS for weight in weights)


def _split(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[Sequence[Tensor], ...]:
    inputs, parameters = counts
    return tensors[:inputs], tensors[inputs : inputs + parameters], tensors[inputs + parameters :]


def _images(x: Tensor) -> list[slice]:
    """Parts of a batch [B, H, W, C] to go through."""
    if x.device.type != "cpu" or x.numel() == 0:
        return [slice(0, len(x))]
    size = max(1, BAND_BYTES // (x[0].numel() * x.element_size()))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
