# SPDX-License-Identifier: Apache-2.0
"""Double backward of autograd nodes with a hand-written backward, by differentiating a plain form of the forward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_differentiable_backward(grads: Sequence[Tensor | None]) -> bool:
    """True if a backward must consist of ATen operators: it is differentiated itself (`create_graph`), or its gradients
    are batched (`is_grads_batched` of `torch.autograd.grad`, vectorized Jacobians).
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or any(grad is not None and batched(grad) for grad in grads)


def differentiable_backward(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*inputs) with respect to its inputs, as part of a graph, given those of its
    first results; None for inputs that require no gradient. (`torch.autograd.grad` silently skips nodes that are marked
    `once_differentiable`, so that a gradient penalty would lose part of its gradient.)
    """
    if all(grad is None for grad in grads):
        return (None,) * len(inputs)
    with torch.enable_grad():
        # views: the inner torch.autograd.grad stops at them
        views = [x.view_as(x) if x.requires_grad else x for x in inputs]
        results = function(*views)
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=False) if grad is not None]
    differentiated = [x for x in views if x.requires_grad]
    outputs, grad_outputs = zip(*pairs, strict=True)
    computed = iter(torch.autograd.grad(outputs, differentiated, grad_outputs, create_graph=True, allow_unused=True))
    return tuple(next(computed) if x.requires_grad else None for x in views)
