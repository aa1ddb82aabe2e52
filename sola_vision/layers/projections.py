# SPDX-License-Identifier: Apache-2.0
"""Matrix products of what an element-wise pass makes: linear(pass(inputs)).

The pass's result is as large as the product's and cheap to compute. Autograd would keep it for the weights' gradient;
here it is computed again in the backward, so that a linear layer keeps about half as much.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from sola_vision import ops
from sola_vision.layers.bands import bands, in_bands

# from the pass's inputs and the gradient of its result to the gradients of the inputs
Backward = Callable[..., tuple[Tensor, ...]]


def shift_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    projections: Sequence[nn.Linear],
    *,
    top: int = 0,
    bottom: int = 0,
) -> tuple[Tensor, ...]:
    """Layer norm, token shift and a projection without bias for each of mixes [M, C]: x [B, H, W, C] -> M results
    [B, H - top - bottom, W, D] (see ops.norm_shift).
    """
    if in_bands(x) and top == bottom == 0:
        return _shift_linear_in_bands(x.contiguous(), weight, bias, eps, mixes, projections)

    def shift(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor) -> Tensor:
        return ops.norm_shift(x, weight, bias, eps, mixes, top=top, bottom=bottom)

    def backward(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        grad = torch.nn.functional.pad(grad, (0, 0, 0, 0, top, bottom))
        return torch.ops.sola.norm_shift_backward(x, weight, bias, eps, mixes, grad)

    return _linear(shift, backward, (x, weight, bias, mixes), projections)


def _shift_linear_in_bands(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, projections: Sequence[nn.Linear]
) -> tuple[Tensor, ...]:
    made = tuple(x.new_empty((*x.shape[:3], projection.out_features)) for projection in projections)
    for band in bands(x, mixes.shape[0] * x.shape[3]):
        near = band.with_neighbours(x)
        shifted = ops.norm_shift(near, weight, bias, eps, mixes, top=band.top, bottom=band.bottom)
        for part, projection, out in zip(shifted, projections, made, strict=True):
            torch.mm(part.flatten(0, 2), projection.weight.t(), out=band.of(out).flatten(0, 2))
    return made


def gate_linear(receptance: Tensor, value: Tensor, projection: nn.Linear) -> Tensor:
    """linear(sigmoid(receptance) * value): [B, H, W, C] twice -> [B, H, W, D]."""
    if in_bands(value):
        receptance, value = receptance.contiguous(), value.contiguous()
        made = value.new_empty((*value.shape[:3], projection.out_features))
        for band in bands(value, value.shape[3]):
            gated = ops.gate(band.of(receptance), band.of(value))
            torch.mm(gated.flatten(0, 2), projection.weight.t(), out=band.of(made).flatten(0, 2))
        return made

    def gate(receptance: Tensor, value: Tensor) -> Tensor:
        return ops.gate(receptance, value)[None]

    def backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.sola.gate_backward(receptance, value, grad[0])

    return _linear(gate, backward, (receptance, value), (projection,))[0]


def squared_relu_linear(hidden: Tensor, projection: nn.Linear) -> Tensor:
    """linear(relu(hidden)^2): [B, H, W, C] -> [B, H, W, D]."""

    def square(hidden: Tensor) -> Tensor:
        return ops.squared_relu(hidden)[None]

    def backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.sola.squared_relu_backward(hidden, grad[0]),)

    return _linear(square, backward, (hidden,), (projection,))[0]


def _linear(
    make: Callable[..., Tensor], backward: Backward, inputs: tuple[Tensor, ...], projections: Sequence[nn.Linear]
) -> tuple[Tensor, ...]:
    # compilers choose themselves what to compute again, and plain torch is to be seen where a path is pinned
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and ops.pinned() in (None, "native"):
        return _Linear.apply(make, backward, len(inputs), *inputs, *(projection.weight for projection in projections))
    return tuple(projection(part) for part, projection in zip(make(*inputs), projections, strict=True))


class _Linear(torch.autograd.Function):
    """Matrix i applied to part i of what `make` makes of the inputs."""

    @staticmethod
    def forward(
        ctx: Any, make: Callable[..., Tensor], backward: Backward, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.make, ctx.backward_of_make, ctx.count = make, backward, count
        ctx.save_for_backward(*tensors)
        made = make(*tensors[:count])
        return tuple(linear(part, weight) for part, weight in zip(made, tensors[count:], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing counts
        inputs, weights = saved[: ctx.count], saved[ctx.count :]
        made = ctx.make(*inputs)
        # under autocast the product was in half precision, and so is its gradient
        grad_made = torch.empty(made.shape, dtype=grads[0].dtype, device=made.device)
        grad_weights = []
        for part, grad, weight, grad_part in zip(made, grads, weights, grad_made, strict=True):
            rows = grad.reshape(-1, weight.shape[0])
            torch.mm(rows, weight.to(rows.dtype), out=grad_part.view(-1, weight.shape[1]))
            grad_weights.append((rows.t() @ part.reshape(-1, weight.shape[1]).to(rows.dtype)).to(weight.dtype))
        return None, None, None, *ctx.backward_of_make(*inputs, grad_made.to(made.dtype)), *grad_weights
