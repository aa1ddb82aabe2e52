# SPDX-License-Identifier: Apache-2.0
"""The definition of Bi-WKV, eq. 9 as written in the paper: O(N^2), in float64. Every other path is tested against it.

    wkv_t = sum_i p_ti v_i,    p_t = softmax_i(a_t),    a_ti = k_i - (|t - i| - 1) w / N  for i != t,    a_tt = u + k_t

B batch, N tokens, C channels; t is the output (query) token, i the input (key) token.
"""

import torch
from torch import Tensor


def weights(decay: Tensor, bonus: Tensor, key: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return p_ti of eq. 9 in float64, the weight of token i in the output of token t; a row sums to 1.

    decay, bonus [C], key [B, N, C] -> [B, T, N, C] for the T tokens that `rows` selects.
    """
    decay, bonus, key = decay.double(), bonus.double(), key.double()
    num_tokens = key.shape[1]
    token = torch.arange(num_tokens, device=key.device)
    between = (token[rows, None] - token).abs() - 1  # [T, N], -1 for the token itself
    distance = between.clamp(min=0).double()[..., None]  # [T, N, 1]
    own = (between < 0)[..., None]
    logits = torch.where(own, bonus, -distance * (decay / max(1, num_tokens))) + key[:, None]  # [B, T, N, C]
    return logits.softmax(dim=2)


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return eq. 9, differentiable: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    batch, num_tokens, channels = key.shape
    # at most 2^24 weights at a time (but at least one row), to bound the memory
    step = max(1, 2**24 // max(1, batch * num_tokens * channels))
    rows = [
        torch.einsum("btnc,bnc->btc", weights(decay, bonus, key, slice(start, start + step)), value.double())
        for start in range(0, max(1, num_tokens), step)
    ]
    return torch.cat(rows, dim=1).to(value.dtype)
