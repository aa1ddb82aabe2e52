# SPDX-License-Identifier: Apache-2.0
"""Softmax attention as a registered operator: definition, fake tensors, autograd, FLOPs (called by `multihead.py`)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from sola_vision.ops import autocast
from sola_vision.ops.arguments import register_fake


def attention(qkv: Tensor, head_dim: int) -> Tensor:
    """Return multi-head softmax attention by torch's SDPA, the definition: qkv [B, N, 3C] -> [B, N, C]."""
    if type(qkv) is Tensor and not torch.jit.is_tracing() and qkv.shape[-1] == 0:
        return qkv.clone()  # SDPA of torch 2.11 would end the process: an integer division by no heads
    return _tokens(scaled_dot_product_attention(*_heads(qkv, head_dim)))


def products(qkv: Tensor, head_dim: int) -> Tensor:
    """Like `attention`, by matrix products and a softmax: differentiable in every mode, with N^2 scores in memory."""
    query, key, value = _heads(qkv, head_dim)
    return _tokens(_weights(query, key) @ value)


def _heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv into queries, keys and values, [B, heads, N, head_dim] each."""
    query, key, value = qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return query, key, value


def _tokens(heads: Tensor) -> Tensor:
    """[B, heads, N, head_dim] -> [B, N, C]."""
    return heads.transpose(1, 2).flatten(2)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    # the query is scaled first: in float16 the product may overflow
    return (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(_scores(query, key), dim=-1)


def _attention_and_sums(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The operator's default kernel: return the result and the log-sum-exp of its scores [B, heads, N]."""
    query, key, _ = _heads(qkv, head_dim)
    return attention(qkv, head_dim).contiguous(), torch.logsumexp(_scores(query.float(), key.float()), dim=-1)


def _attention_backward(qkv: Tensor, head_dim: int, out: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The default kernel of the backward; it is differentiable itself, since it does not use out and lse."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    query, key, value = _heads(qkv.to(dtype), head_dim)
    grad_out = grad.to(dtype).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    weights = _weights(query, key)
    grad_weights = grad_out @ value.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * head_dim**-0.5
    parts = grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad_out
    return torch.cat([_tokens(part) for part in parts], dim=-1).to(qkv.dtype)


def _fake(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    lse = qkv.new_empty((batch, width // (3 * head_dim), tokens), dtype=torch.float32)
    return qkv.new_empty((batch, tokens, width // 3)), lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.head_dim = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as the gradient of the log-sum-exp


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    qkv, out, lse = ctx.saved_tensors
    backward = _attention_backward if torch.is_grad_enabled() else torch.ops.sola.attention_backward
    return backward(qkv, ctx.head_dim, out, lse, grad), None


def _cost(qkv: Any, head_dim: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count N^2 multiply-adds per channel of queries and of values, as two operations each like FlopCounterMode."""
    batch, tokens, width = qkv
    return 2 * 2 * batch * tokens * tokens * (width // 3)


def _backward_cost(qkv: Any, head_dim: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # five products instead of the forward's two, as FlopCounterMode counts torch's own backward
    return _cost(qkv, head_dim) * 5 // 2


def register(library: torch.library.Library) -> None:
    """Define the operator, with torch's SDPA as its default kernel."""
    pt2 = (torch.Tag.pt2_compliant_tag,)
    library.define("attention(Tensor qkv, int head_dim) -> (Tensor, Tensor)", tags=pt2)
    library.define(
        "attention_backward(Tensor qkv, int head_dim, Tensor out, Tensor lse, Tensor grad) -> Tensor", tags=pt2
    )
    library.impl("attention", _attention_and_sums, "CompositeExplicitAutograd")
    library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
    register_fake(library, "attention", _fake)
    register_fake(
        library,
        "attention_backward",
        lambda qkv, head_dim, *_: torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
    )
    torch.library.register_autograd("sola::attention", _differentiate, setup_context=_save, lib=library)
    autocast.register(library, "attention", torch.ops.sola.attention, (0,))
    register_flop_formula(torch.ops.sola.attention)(_cost)
    register_flop_formula(torch.ops.sola.attention_backward)(_backward_cost)
