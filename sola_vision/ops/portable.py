# SPDX-License-Identifier: Apache-2.0
"""Bi-WKV in plain torch at a cost linear in N, correct for every key, value, decay and bonus: the default kernel.

With d = w / N, eq. 9 is the quotient of two sums, computed by a left-to-right and a right-to-left scan:

    A_t = sum_{i<t} e^{-(t-i-1) d + k_i} (v_i, 1),    R_t = sum_{i>t} e^{-(i-t-1) d + k_i} (v_i, 1)
    y_t = (A + R + e^{u+k_t} (v_t, 1)),  first component over second

A state is stored as e^m s with m the largest exponent in it, in float64, so that nothing over- or underflows and the
rounding of an exponent is negligible in float32. The mixing matrix is symmetric: the backward needs the same scans.

Tensors in this file are time-major, [N, B, C]; a state of K sums is [N, K, B, C]. Devices without float64 are passed to
`portable_float32.py`.
"""

import torch
from torch import Tensor

from sola_vision.ops import portable_float32

# exponent of an empty state: e^EMPTY is 0 relative to any weight, and EMPTY - EMPTY is 0 where -inf would give nan
_EMPTY = -1e300
# beyond this decay a weight is zero or dominates; the bound keeps sums of exponents exact enough to resolve ties
_MAX_DECAY = 1e8


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return eq. 9: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    if key.numel() == 0:
        return torch.empty_like(value, memory_format=torch.contiguous_format)
    if not _has_float64(key.device):
        return portable_float32.wkv(decay, bonus, key, value)
    d, u, k, v = _prepare(decay, bonus, key, value)
    _, num, den, *_ = _states(d, u, k, v)
    return (num / den).transpose(0, 1).to(value.dtype).contiguous()


def wkv_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `wkv` with respect to decay, bonus [C], key and value [B, N, C], in the inputs' dtypes.

    With D = e^m den the denominator, h = g / D and q = h y; H = S h and Q = S q with the symmetric mixing matrix S:
    gv = e^k H, gk = e^k (v H - Q), gu = e^u sum(e^k (v h - q)). In the decay's gradient each pair of tokens counts as
    often as there are tokens m between them, which is a sum over m of left states times right states.
    """
    if key.numel() == 0:
        return torch.zeros_like(decay), torch.zeros_like(bonus), torch.zeros_like(key), torch.zeros_like(value)
    if not _has_float64(key.device):
        return portable_float32.wkv_backward(decay, bonus, key, value, grad)
    d, u, k, v = _prepare(decay, bonus, key, value)
    top, num, den, left, right = _states(d, u, k, v)
    y = num / den
    h = grad.double().transpose(0, 1) / den
    q = h * y
    # (h, q) is scanned like (v, 1), with the weight e^-m
    back_left, back_right = _both_scans(d, -top, torch.stack((h, q), dim=1))
    own = torch.exp(u + k - top)  # a token's weight for itself, relative to the scale of D

    mixed = own[:, None] * torch.stack((h, q), dim=1)
    for m, s in (back_left, back_right):
        mixed = mixed + torch.exp(k + m)[:, None] * s
    gv, gq = mixed.unbind(1)
    gk = v * gv - gq
    gu = (own * (v * h - q)).sum((0, 1))

    gd = torch.zeros_like(d)
    for (m, s), (bm, bs) in ((left, back_right), (right, back_left)):
        gd = gd - (torch.exp(m + bm - d) * (s[:, 0] * bs[:, 0] - s[:, 1] * bs[:, 1])).sum((0, 1))

    def batch_major(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.transpose(0, 1).to(like.dtype).contiguous()

    gw = gd / k.shape[0]
    return gw.to(decay.dtype), gu.to(bonus.dtype), batch_major(gk, key), batch_major(gv, value)


def _has_float64(device: torch.device) -> bool:
    return device.type != "mps"  # the only one known here


def _prepare(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = (x.double().transpose(0, 1).contiguous() for x in (key, value))
    d = decay.double() / k.shape[0]
    return d.clamp(-_MAX_DECAY, _MAX_DECAY), bonus.double(), k, v


def _states(
    d: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return numerator and denominator of eq. 9 as e^top (num, den), and the left and right states they consist of."""
    pair = torch.stack((v, torch.ones_like(v)), dim=1)
    left, right = _both_scans(d, k, pair)
    own = u + k
    top = torch.maximum(torch.maximum(left[0], right[0]), own)
    total = torch.exp(own - top)[:, None] * pair
    for m, s in (left, right):
        total = total + torch.exp(m - top)[:, None] * s
    num, den = total.unbind(1)
    return top, num, den, left, right


def _both_scans(d: Tensor, logw: Tensor, s: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Exclusive scans from the left and from the right, concatenated along the batch to halve the number of steps."""
    batch = logw.shape[1]
    m, s = _scan(d, torch.cat((logw, logw.flip(0)), dim=1), torch.cat((s, s.flip(0)), dim=2))
    return (m[:, :batch], s[:, :, :batch]), (m[:, batch:].flip(0), s[:, :, batch:].flip(0))


def _scan(d: Tensor, logw: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each token, sum_{i<t} e^{-(t-i-1) d + logw_i} s_i, as (m, sums): e^m times the sums.

    d [C], logw [N, B, C], s [N, K, B, C]. Chunks of about sqrt(N) tokens are scanned in parallel; their totals form a
    shorter sequence, which is scanned recursively with the decay of a whole chunk.
    """
    num_tokens, sums, batch, channels = s.shape
    length = min(64, max(8, round(num_tokens**0.5)))
    chunks = -(-num_tokens // length)
    if chunks <= 1:
        length, chunks = num_tokens, 1
    padding = chunks * length - num_tokens
    logw = torch.nn.functional.pad(logw, (0, 0, 0, 0, 0, padding), value=_EMPTY)
    s = torch.nn.functional.pad(s, (0, 0, 0, 0, 0, 0, 0, padding))
    logw = logw.view(chunks, length, batch, channels).transpose(0, 1).contiguous()  # [L, chunks, B, C]
    s = s.view(chunks, length, sums, batch, channels).permute(1, 2, 0, 3, 4).contiguous()  # [L, K, chunks, B, C]

    # nothing is written in place: torch.func.linearize would take the tensor for a constant
    states: list[tuple[Tensor, Tensor]] = []
    m, state = torch.full_like(logw[0], _EMPTY), torch.zeros_like(s[0])
    for j in range(length):
        states.append((m, state))
        faded = m - d
        m = torch.maximum(faded, logw[j])
        state = state * torch.exp(faded - m) + s[j] * torch.exp(logw[j] - m)
    before_m, before_s = (torch.stack(parts) for parts in zip(*states, strict=True))

    if chunks > 1:
        carry_m, carry_s = _scan(d * length, m, state.transpose(0, 1))
        step = torch.arange(length, device=d.device, dtype=d.dtype)[:, None, None, None]
        carry_m = carry_m - step * d
        carry_s = carry_s.transpose(0, 1)
        m = torch.maximum(before_m, carry_m)
        before_s = before_s * torch.exp(before_m - m)[:, None] + carry_s * torch.exp(carry_m - m)[:, None]
        before_m = m
    before_m = before_m.transpose(0, 1).reshape(chunks * length, batch, channels)[:num_tokens]
    return before_m, before_s.permute(2, 0, 1, 3, 4).reshape(chunks * length, -1, batch, channels)[:num_tokens]
