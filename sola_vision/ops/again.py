# SPDX-License-Identifier: Apache-2.0
"""Backwards to be differentiated again: a node whose backward is written out goes back to steps that autograd knows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_plain_steps(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward has to go back to them: it is differentiated again, or many gradients come as one
    (`is_grads_batched` of `torch.autograd.grad`, vectorised jacobians), which only torch's own operators divide.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or any(grad is not None and batched(grad) for grad in grads)


def differentiable_backward(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of function(*inputs) for its inputs, with a graph of their own, from those of its first results; None
    for inputs that need none. `torch.autograd.grad` passes over a node that says it has no second derivative.
    """
    if all(grad is None for grad in grads):
        return (None,) * len(inputs)
    with torch.enable_grad():
        views = [x.view_as(x) if x.requires_grad else x for x in inputs]  # whose gradients end here
        results = function(*views)
    pairs = [(made, grad) for made, grad in zip(results, grads, strict=False) if grad is not None]
    wanted = [x for x in views if x.requires_grad]
    made, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(made, wanted, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in views)
