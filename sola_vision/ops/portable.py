# SPDX-License-Identifier: Apache-2.0
"""Bi-WKV in plain torch at a cost linear in N, right for every key, value, decay and bonus: the default kernel.

With d = w / N, eq. 9 is the quotient of two sums that a left-to-right and a right-to-left scan provide:

    A_t = sum_{i<t} e^{-(t-i-1) d + k_i} (v_i, 1),    R_t = sum_{i>t} e^{-(i-t-1) d + k_i} (v_i, 1)
    y_t = (A + R + e^{u+k_t} (v_t, 1)),  first component over second

A state is kept as e^m s with m the largest exponent in it, in float64, so that nothing over- or underflows and the
rounding of an exponent does not show in float32. The mixing matrix is symmetric: the backward needs the same scans.

Time comes first inside this file: [N, B, C], and a state carries K sums: [N, K, B, C].
"""

import torch
from torch import Tensor

# an empty state: e^EMPTY is 0 beside anything, and EMPTY - EMPTY is 0 where -inf would give nan
_EMPTY = -1e300
# beyond this a token's weight is all or nothing; the bound keeps sums of exponents exact enough to tell ties apart
_STEEPEST = 1e8


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Eq. 9: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    if key.numel() == 0:
        return torch.empty_like(value, memory_format=torch.contiguous_format)
    d, u, k, v = _prepare(decay, bonus, key, value)
    _, num, den, *_ = _states(d, u, k, v)
    return (num / den).transpose(0, 1).to(value.dtype).contiguous()


def wkv_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `wkv` for decay, bonus [C], key and value [B, N, C], each in its input's dtype.

    With D = e^m den the denominator, h = g / D and q = h y; H = S h and Q = S q with the symmetric mixing matrix S:
    gv = e^k H, gk = e^k (v H - Q), gu = e^u sum(e^k (v h - q)). The decay's gradient counts, for every pair, the tokens
    between them: each token m in between sees the left state of one side and the right state of the other.
    """
    if key.numel() == 0:
        return torch.zeros_like(decay), torch.zeros_like(bonus), torch.zeros_like(key), torch.zeros_like(value)
    d, u, k, v = _prepare(decay, bonus, key, value)
    top, num, den, left, right = _states(d, u, k, v)
    y = num / den
    h = grad.double().transpose(0, 1) / den
    q = h * y
    # the pair (h, q) is scanned like (v, 1), its weight being e^-m
    back_left, back_right = _both_scans(d, -top, torch.stack((h, q), dim=1))
    own = torch.exp(u + k - top)  # weight of a token on itself, over D's scale

    mixed = own[:, None] * torch.stack((h, q), dim=1)
    for m, s in (back_left, back_right):
        mixed = mixed + torch.exp(k + m)[:, None] * s
    gv, gq = mixed.unbind(1)
    gk = v * gv - gq
    gu = (own * (v * h - q)).sum((0, 1))

    gd = torch.zeros_like(d)
    for (m, s), (bm, bs) in ((left, back_right), (right, back_left)):
        gd = gd - (torch.exp(m + bm - d) * (s[:, 0] * bs[:, 0] - s[:, 1] * bs[:, 1])).sum((0, 1))

    def shaped(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.transpose(0, 1).to(like.dtype).contiguous()

    gw = gd / k.shape[0]
    return gw.to(decay.dtype), gu.to(bonus.dtype), shaped(gk, key), shaped(gv, value)


def _prepare(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = (x.double().transpose(0, 1).contiguous() for x in (key, value))
    d = decay.double() / k.shape[0]
    return d.clamp(-_STEEPEST, _STEEPEST), bonus.double(), k, v


def _states(
    d: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Numerator and denominator of eq. 9 as e^top (num, den), and the left and right states they came from."""
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
    """Exclusive scans from the left and from the right, side by side in one batch: half the steps."""
    batch = logw.shape[1]
    m, s = _scan(d, torch.cat((logw, logw.flip(0)), dim=1), torch.cat((s, s.flip(0)), dim=2))
    return (m[:, :batch], s[:, :, :batch]), (m[:, batch:].flip(0), s[:, :, batch:].flip(0))


def _scan(d: Tensor, logw: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """State before each token: sum_{i<t} e^{-(t-i-1) d + logw_i} s_i, as e^m times the returned sums.

    d [C], logw [N, B, C], s [N, K, B, C]. Chunks of about sqrt(N) tokens are scanned side by side; their sums are a
    shorter sequence that is scanned in the same way, with the decay of a whole chunk.
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

    before_m, before_s = torch.empty_like(logw), torch.empty_like(s)
    m, state = torch.full_like(logw[0], _EMPTY), torch.zeros_like(s[0])
    for j in range(length):
        before_m[j], before_s[j] = m, state
        faded = m - d
        m = torch.maximum(faded, logw[j])
        state = state * torch.exp(faded - m) + s[j] * torch.exp(logw[j] - m)

    if chunks > 1:
        carry_m, carry_s = _scan(d * length, m, state.transpose(0, 1))
        step = torch.arange(length, device=d.device, dtype=d.dtype)[:, None, None, None]
        carry_m = carry_m - step * d
        carry_s = carry_s.transpose(0, 1)
        m = torch.maximum(before_m, carry_m)
        before_s.mul_(torch.exp(before_m - m)[:, None]).add_(carry_s * torch.exp(carry_m - m)[:, None])
        before_m = m
    before_m = before_m.transpose(0, 1).reshape(chunks * length, batch, channels)[:num_tokens]
    return before_m, before_s.permute(2, 0, 1, 3, 4).reshape(chunks * length, -1, batch, channels)[:num_tokens]
