# SPDX-License-Identifier: Apache-2.0
"""Matrix products fused with the passes before and after them, for CPUs: a pass writes a tile of tokens to the core's
cache, where it is multiplied (`csrc/linear.cpp`), in inference and in the training forward.

The plain forms in this file define the results and are the default kernels of `sola::NAME`. The operators have no
autograd formula: `layers/projections.py` calls the backwards explicitly.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from sola_vision.ops import autocast, passes
from sola_vision.ops.arguments import register_fake


def _norm_shift_linear(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, projections: list[Tensor]
) -> list[Tensor]:
    shifted = passes._norm_shift(x, weight, bias, eps, mixes, 0, 0)
    return [linear(part, projection) for part, projection in zip(shifted, projections, strict=True)]


def _gate_linear(receptance: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    return linear(passes._gate(receptance, value), projection)


def _squared_relu_linear(x: Tensor, projection: Tensor) -> Tensor:
    return linear(passes._squared_relu(x), projection)


def _spatial_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    receptance: Tensor,
    output: Tensor,
    readout: Tensor,
) -> Tensor:
    """Return the rest of the spatial mix, given the operator's output, the readout [B, H, W, C]; mixes [1, C]."""
    (gate,) = _norm_shift_linear(x, weight, bias, eps, mixes, [receptance])
    return x + _gate_linear(gate, readout, output)


def _channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    key: Tensor,
    receptance: Tensor,
    value: Tensor,
) -> Tensor:
    hidden, gate = _norm_shift_linear(x, weight, bias, eps, mixes, [key, receptance])
    return passes._gated_sum(x, gate, _squared_relu_linear(hidden, value))


# ---- the backwards


def _product_backward(x: Tensor, projection: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of linear(x, projection) with respect to x and projection."""
    return grad @ projection, grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _norm_shift_linear_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    projections: list[Tensor],
    grads: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    shifted = passes._norm_shift(x, weight, bias, eps, mixes, 0, 0)
    pairs = [_product_backward(*each) for each in zip(shifted, projections, grads, strict=True)]
    grad_shifted = torch.stack([grad_part for grad_part, _ in pairs])
    grad_projections = [grad_projection for _, grad_projection in pairs]
    return *passes._norm_shift_backward(x, weight, bias, eps, mixes, grad_shifted), grad_projections


def _gate_linear_backward(
    receptance: Tensor, value: Tensor, projection: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gated, grad_projection = _product_backward(passes._gate(receptance, value), projection, grad)
    return *passes._gate_backward(receptance, value, grad_gated), grad_projection


def _squared_relu_linear_backward(x: Tensor, projection: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_squared, grad_projection = _product_backward(passes._squared_relu(x), projection, grad)
    return passes._squared_relu_backward(x, grad_squared), grad_projection


# ---- registration


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _product_like(x: Tensor, projection: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], projection.shape[0]))


# two operations for each multiply-add, as FlopCounterMode counts them; it passes shapes instead of tensors


def _cost(x: Any, *weights: Any) -> int:
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights)


def _norm_shift_linear_cost(
    x: Any, weight: Any, bias: Any, eps: Any, mixes: Any, projections: Any, *_: Any, out_shape: Any = None
) -> int:
    return _cost(x, *projections)


def _element_linear_cost(*tensors: Any, out_shape: Any = None) -> int:
    """The tensors are (receptance, value, projection) or (value, projection)."""
    return _cost(tensors[0], tensors[-1])


def _mix_cost(x: Any, weight: Any, bias: Any, eps: Any, mixes: Any, *others: Any, out_shape: Any = None) -> int:
    """The weights are the two-dimensional ones of the other tensors."""
    return _cost(x, *(other for other in others if len(other) == 2))


def _norm_shift_linear_backward_cost(*tensors: Any, out_shape: Any = None) -> int:
    return 2 * _norm_shift_linear_cost(*tensors)


def _element_linear_backward_cost(*tensors: Any, out_shape: Any = None) -> int:
    return 2 * _element_linear_cost(*tensors[:-1])


def register(library: torch.library.Library) -> None:
    """Define the products, with their plain forms as default kernels."""

    def define(schema: str, kernel: Any, fake: Any) -> None:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        register_fake(library, name, fake)

    shift = "(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, "
    define(
        f"norm_shift_linear{shift}Tensor[] projections) -> Tensor[]",
        _norm_shift_linear,
        lambda x, weight, bias, eps, mixes, projections: [_product_like(x, projection) for projection in projections],
    )
    define(
        "gate_linear(Tensor receptance, Tensor value, Tensor projection) -> Tensor",
        _gate_linear,
        lambda receptance, value, projection: _product_like(value, projection),
    )
    define("squared_relu_linear(Tensor x, Tensor projection) -> Tensor", _squared_relu_linear, _product_like)
    define(
        f"spatial_mix{shift}Tensor receptance, Tensor output, Tensor readout) -> Tensor",
        _spatial_mix,
        lambda x, *_: _like(x),
    )
    define(
        f"channel_mix{shift}Tensor key, Tensor receptance, Tensor value) -> Tensor",
        _channel_mix,
        lambda x, *_: _like(x),
    )
    define(
        f"norm_shift_linear_backward{shift}Tensor[] projections, Tensor[] grads) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
        _norm_shift_linear_backward,
        lambda x, weight, bias, eps, mixes, projections, grads: (
            *(_like(tensor) for tensor in (x, weight, bias, mixes)),
            [_like(projection) for projection in projections],
        ),
    )
    define(
        "gate_linear_backward(Tensor receptance, Tensor value, Tensor projection, Tensor grad) "
        "-> (Tensor, Tensor, Tensor)",
        _gate_linear_backward,
        lambda receptance, value, projection, grad: (_like(receptance), _like(value), _like(projection)),
    )
    define(
        "squared_relu_linear_backward(Tensor x, Tensor projection, Tensor grad) -> (Tensor, Tensor)",
        _squared_relu_linear_backward,
        lambda x, projection, grad: (_like(x), _like(projection)),
    )
    # autocast converts the products
    for operator, kernel in (
        (torch.ops.sola.norm_shift_linear, _norm_shift_linear),
        (torch.ops.sola.gate_linear, _gate_linear),
        (torch.ops.sola.squared_relu_linear, _squared_relu_linear),
        (torch.ops.sola.spatial_mix, _spatial_mix),
        (torch.ops.sola.channel_mix, _channel_mix),
    ):
        autocast.register_plain(library, operator.__name__, operator, kernel, always=True)
    for operator, formula in (
        (torch.ops.sola.norm_shift_linear, _norm_shift_linear_cost),
        (torch.ops.sola.gate_linear, _element_linear_cost),
        (torch.ops.sola.squared_relu_linear, _element_linear_cost),
        (torch.ops.sola.spatial_mix, _mix_cost),
        (torch.ops.sola.channel_mix, _mix_cost),
        (torch.ops.sola.norm_shift_linear_backward, _norm_shift_linear_backward_cost),
        (torch.ops.sola.gate_linear_backward, _element_linear_backward_cost),
        (torch.ops.sola.squared_relu_linear_backward, _element_linear_backward_cost),
    ):
        register_flop_formula(operator)(formula)
