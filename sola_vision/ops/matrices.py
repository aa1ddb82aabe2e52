# SPDX-License-Identifier: Apache-2.0
"""Eq. 9 as matrix products with small tables: what `torch.onnx.export` sees, which knows no `sola::wkv`.

`sola export` writes the same products node by node (`export/wkv.py`), since following sizes that are symbols through
these takes torch.export minutes.

Tokens are scanned in chunks of 16, their sums in the same way, and the sums of those by one table of N / 256 squared.
Exponents are float32, relative to the largest key of each image and channel: exact for keys within 60 of it and for
w >= -24, and for a bonus within 60 of zero; what is beyond is flattened to these bounds. The other paths have no
bounds, so nothing else takes this one.
"""

import torch
from torch import Tensor

_CHUNK = 16
_LEVELS = 2  # of chunks of chunks, before the table
_SMALLEST_KEY = -60.0
_LARGEST_BONUS = 60.0  # either way: of a single token nothing else may be left, and e^89 is no number
_LARGEST_WEIGHT = 24.0  # of an exponent, where the decay is negative


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    d = decay.float() / key.shape[1]
    e = torch.exp((key.float() - key.float().amax(1, keepdim=True)).clamp(min=_SMALLEST_KEY))
    s = torch.stack((e * value.float(), e)).permute(3, 0, 1, 2)  # [C, 2, B, N]
    rows = torch.stack((s, s.flip(3)), dim=1).flatten(1, 3)
    left, right = _scan(d, rows, _LEVELS).reshape(-1, 2, *s.shape[1:]).unbind(1)
    own = torch.exp(bonus.float().clamp(-_LARGEST_BONUS, _LARGEST_BONUS))
    num, den = (left + right.flip(3) + own[:, None, None, None] * s).unbind(1)
    return (num / den).permute(1, 2, 0).to(value.dtype)


def _scan(d: Tensor, s: Tensor, levels: int) -> Tensor:
    """sum_{i<t} e^{-(t-i-1) d} s_i for every t; d [C], s [C, rows, length] -> the same."""
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
    """[C, length, length]: what place i (row) leaves at place t > i (column)."""
    place = torch.arange(length, device=d.device)
    between = place - place[:, None] - 1
    return torch.where(between < 0, 0.0, _powers(d, between))


def _powers(d: Tensor, steps: Tensor) -> Tensor:
    """e^{-d steps}: [C] -> [C, *steps.shape]."""
    exponents = -d.view(-1, *[1] * steps.ndim) * steps
    return torch.exp(exponents.clamp(max=_LARGEST_WEIGHT))
