# SPDX-License-Identifier: Apache-2.0
"""Bi-WKV in plain torch and float32, for devices without float64 (Apple's GPU).

The sums are those of `portable.py`. Float32 would not hold their exponents, so a sum is kept as e^(key - age d) s: the
largest key in it, unrounded, and how many tokens ago that was. Two sums are compared by the difference of their keys
minus that of their ages times d. What is rounded is each of the two, once: errors are those of the other paths for keys
and bonuses up to some hundreds, and grow with larger ones that cancel (docs/wkv.md).

A scan doubles the span of each sum log2(N) times: large steps, as GPUs need. Tensors are batch-major; a scan of K sums
is [K, B, N, C].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# beyond this decay a weight is zero or dominates; N times it is finite
_MAX_DECAY = 1e8
_EMPTY = torch.finfo(torch.float32).min  # key of an empty sum


class Scaled(NamedTuple):
    """e^(key - age d) sums, for every token."""

    key: Tensor  # [B, N, C]
    age: Tensor  # [B, N, C], tokens
    sums: Tensor  # [K, B, N, C]


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return eq. 9: decay, bonus [C], key, value [B, N, C] with N >= 1 -> [B, N, C] in value's dtype."""
    total, _, _ = _states(*_prepare(decay, bonus, key, value))
    return (total.sums[0] / total.sums[1]).to(value.dtype)


def wkv_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `wkv` with respect to decay, bonus [C], key and value [B, N, C], in the inputs' dtypes,
    by the formulas of `portable.wkv_backward`.
    """
    d, u, k, v = _prepare(decay, bonus, key, value)
    total, left, right = _states(d, u, k, v)
    num, den = total.sums
    h = grad.float() / den
    q = h * (num / den)
    scanned = torch.stack((h, q))
    back_left, back_right = _both_scans(d, Scaled(-total.key, -total.age, scanned))

    own = torch.exp(u + torch.addcmul(k - total.key, total.age, d))
    gv, gq = own * scanned
    gd = torch.zeros_like(d)
    for state, back in ((left, back_right), (right, back_left)):
        weight = torch.exp(torch.addcmul(k + back.key, back.age, -d))
        gv, gq = gv + weight * back.sums[0], gq + weight * back.sums[1]
        weight = torch.exp(torch.addcmul(state.key + back.key, state.age + back.age + 1, -d))
        pairs = state.sums * back.sums
        gd = gd - (weight * (pairs[0] - pairs[1])).sum((0, 1))
    gk = v * gv - gq
    gu = (own * (v * h - q)).sum((0, 1))
    gw = gd / k.shape[1]
    return gw.to(decay.dtype), gu.to(bonus.dtype), gk.to(key.dtype), gv.to(value.dtype)


def _prepare(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = (decay.float() / key.shape[1]).clamp(-_MAX_DECAY, _MAX_DECAY)
    return d, bonus.float(), key.float().clamp(min=_EMPTY).contiguous(), value.float().contiguous()


def _states(d: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Scaled, Scaled, Scaled]:
    """Return numerator and denominator of eq. 9, and the left and right states that they consist of."""
    tokens = Scaled(k, torch.zeros_like(k), torch.stack((v, torch.ones_like(v))))
    left, right = _both_scans(d, tokens)
    own = tokens._replace(key=u + k)
    return _sum(d, _sum(d, left, right), own), left, right


def _both_scans(d: Tensor, x: Scaled) -> tuple[Scaled, Scaled]:
    """Exclusive scans from the left and from the right, concatenated along the batch to halve the number of steps."""
    scanned = _scan(d, Scaled(*(torch.cat((part, part.flip(-2)), -3) for part in x)))
    left, right = zip(*(part.chunk(2, -3) for part in scanned), strict=True)
    return Scaled(*left), Scaled(*(part.flip(-2) for part in right))


def _scan(d: Tensor, x: Scaled) -> Scaled:
    """Return sum_{i<t} e^{-(t-i-1) d} x_i for every token t."""
    num_tokens, span = x.key.shape[1], 1
    while span < num_tokens:
        earlier = Scaled(x.key[:, :-span], x.age[:, :-span] + span, x.sums[:, :, :-span])
        longer = _sum(d, Scaled(*(part[..., span:, :] for part in x)), earlier)
        x = Scaled(*(torch.cat((part[..., :span, :], more), -2) for part, more in zip(x, longer, strict=True)))
        span *= 2
    return Scaled(
        *(pad(part[..., :-1, :], (0, 0, 1, 0), value=fill) for part, fill in zip(x, (_EMPTY, 0, 0), strict=True))
    )


def _sum(d: Tensor, a: Scaled, b: Scaled) -> Scaled:
    between = torch.addcmul(a.key - b.key, b.age - a.age, d)
    larger = between >= 0
    # of two equal sums the one that is kept has a constant weight: derivatives are right there, too
    other = torch.exp(torch.where(larger, -between, between))
    sums = a.sums * torch.where(larger, 1.0, other) + b.sums * torch.where(larger, other, 1.0)
    return Scaled(torch.where(larger, a.key, b.key), torch.where(larger, a.age, b.age), sums)
