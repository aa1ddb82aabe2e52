# SPDX-License-Identifier: Apache-2.0
"""Eq. 9 as matrix products with small tables, for `torch.onnx.export`, which cannot translate `sola::wkv`.

`sola export` writes the same products node by node (`export/wkv.py`), since torch.export takes minutes to trace these
with symbolic sizes.

Tokens are scanned in chunks of 16, the chunks' sums in the same way, and the sums of those by one square table with
N / 256 rows. Exponents are float32, relative to the largest key of each image and channel: exact for keys within 60 of
it, for w >= -24 and for a bonus within 60 of zero; values beyond these bounds are clamped. The other paths have no
bounds, so only ONNX export uses this one.
"""

import torch
from torch import Tensor

_CHUNK = 16
_LEVELS = 2  # chunked scans before the final table
_SMALLEST_KEY = -60.0
_LARGEST_BONUS = 60.0  # in absolute value: a single token has no other weight, and e^89 overflows
_LARGEST_EXPONENT = 24.0  # reached only if the decay is negative


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return eq. 9: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    d = decay.float() / key.shape[1]
    e = torch.exp((key.float() - key.float().amax(1, keepdim=True)).clamp(min=_SMALLEST_KEY))
    s = torch.stack((e * value.float(), e)).permute(3, 0, 1, 2)  # [C, 2, B, N]
    rows = torch.stack((s, s.flip(3)), dim=1).flatten(1, 3)
    left, right = _scan(d, rows, _LEVELS).reshape(-1, 2, *s.shape[1:]).unbind(1)
    own = torch.exp(bonus.float().clamp(-_LARGEST_BONUS, _LARGEST_BONUS))
    num, den = (left + right.flip(3) + own[:, None, None, None] * s).unbind(1)
    return (num / den).permute(1, 2, 0).to(value.dtype)


def _scan(d: Tensor, s: Tensor, levels: int) -> Tensor:
    """Return sum_{i<t} e^{-(t-i-1) d} s_i for every t: d [C], s [C, rows, length] -> [C, rows, length]."""
    if levels == 0:
        return s @ _table(d, s.shape[2])
    channels, rows, length = s.shape
    padded = torch.nn.functional.pad(s, (0, -length % _CHUNK))
    chunks = padded.reshape(channels, -1, _CHUNK)
    step = torch.arange(_CHUNK, device=s.device)
    sums = (chunks @ _powers(d, _CHUNK - 1 - step)[..., None]).reshape(channels, rows, -1)
    carried = _scan(_CHUNK * d, sums, levels - 1).reshape(channels, -1, 1)
    scanned = chunks @ _table(d, _CHUNK) + carried * _powers(d, step)[:, None]
    return scanned.reshape(channels, rows, -1)[:, :, :length]


def _table(d: Tensor, length: int) -> Tensor:
    """Return [C, length, length]: the weight of position i (row) in the sum at position t > i (column), else 0."""
    position = torch.arange(length, device=d.device)
    between = position - position[:, None] - 1
    return torch.where(between < 0, 0.0, _powers(d, between))


def _powers(d: Tensor, steps: Tensor) -> Tensor:
    """Return e^{-d steps}: d [C] -> [C, *steps.shape]."""
    exponents = -d.view(-1, *[1] * steps.ndim) * steps
    return torch.exp(exponents.clamp(max=_LARGEST_EXPONENT))
