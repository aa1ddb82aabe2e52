# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's operator as computed by its published kernels, for networks trained with them. It is not eq. 9.

The kernels split N tokens into chunks of L = ceil(N / 32). With d = w / N, for token t in the chunk that begins at
token s, token j has the weight

    j < s               e^{k_j - (t - j) d}                 (eq. 9: t - j - 1)
    s <= j < t          e^{k_j - (t - j - 1) d}
    j = t               e^{k_t + u / N}                     (eq. 9: u)
    j > t               e^{k_j - (j - t) d}                 (eq. 9: j - t - 1)

and every token s < j <= t has an additional weight (1 - e^d) e^{k_j + (t - j) d}: when a passed token is subtracted
from the running sum of later tokens, its decay is off by one step, and this remainder stays and grows. 1e-6 is added to
the sum of weights, which is stored relative to the largest exponent so far.

This implementation uses cumulative sums inside the chunks and a table of 32 x 32 between them: plain torch in float64,
linear in N, differentiated by autograd. It is correct for |w| below about 600, beyond any value that trains.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sola_vision.ops.arguments import check_wkv
from sola_vision.ops.path import exporting

_CHUNKS = 32
_EPS = 1e-6


def published_wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return Vision-RWKV's published operator: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype.
    decay and bonus are divided by N here.

    Raises ValueError if shapes or devices do not match, TypeError for unsupported dtypes.
    """
    check_wkv("published_wkv", decay, bonus, key, value)
    if exporting():
        raise ValueError("Vision-RWKV's published operator cannot be exported: build the network with eq9=True")
    batch, num_tokens, channels = key.shape
    if num_tokens == 0:
        return torch.zeros_like(value)
    length = -(-num_tokens // _CHUNKS)
    chunks = -(-num_tokens // length)
    d, u = decay.double() / num_tokens, bonus.double() / num_tokens
    k = key.double()
    k = k - k.detach().amax(1, keepdim=True)  # a common factor of all weights
    tail = (0, 0, 0, chunks * length - num_tokens)
    k = pad(k, tail, value=-torch.inf).view(batch, chunks, length, channels)
    v = pad(value.double(), tail).view(batch, chunks, length, channels)
    own = k.exp()[..., None] * torch.stack((v, torch.ones_like(v)), dim=-1)  # [B, chunks, L, C, 2]

    place = torch.arange(length, device=key.device)[:, None]
    grow, fall = torch.exp(place * d)[..., None], torch.exp(-place * d)[..., None]  # [L, C, 1]
    rising, falling = own * grow, own * fall
    chunk = torch.arange(chunks, device=key.device)
    table = torch.exp(-d[:, None, None] * length * (chunk[:, None] - chunk).abs())  # [C, chunks, chunks]
    earlier = torch.einsum("cij,bjcp->bicp", table.tril(-1), rising.sum(2))[:, :, None]
    later = torch.einsum("cij,bjcp->bicp", table.triu(1), falling.sum(2))[:, :, None]
    before = _up_to(rising)
    after = _up_to(falling.flip(2)).flip(2)
    passed = pad(falling[:, :, 1:], (0, 0, 0, 0, 1, 0)).cumsum(2)

    step = torch.exp(d)[:, None]
    total = (
        fall * (earlier + step * before) + grow * (later + after + (1 - step) * passed) + torch.exp(u)[:, None] * own
    )
    weighted, weights = total.unbind(-1)
    y = weighted / (weights + _EPS * _largest(d, u, k).exp())
    return y.reshape(batch, chunks * length, channels)[:, :num_tokens].to(value.dtype)


def _up_to(x: Tensor) -> Tensor:
    """Return the exclusive cumulative sum inside each chunk: [B, chunks, L, C, 2] -> [B, chunks, L, C, 2]."""
    return pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2)


@torch.no_grad()
def _largest(d: Tensor, u: Tensor, k: Tensor) -> Tensor:
    """Return the kernels' running maximum of exponents at each token: d, u [C], k [B, chunks, L, C] -> as k."""
    chunks, length = k.shape[1:3]
    place = d * torch.arange(length, device=k.device)[:, None]
    begin = d * length * torch.arange(chunks, device=k.device)[:, None]  # of each chunk
    rising, falling = k + place, k - place
    none = torch.full_like(k[:, :1, :1], -torch.inf)
    # earlier tokens: of other chunks, then of this one
    ends = (rising.amax(2) + begin).cummax(1).values
    earlier = torch.cat((none[:, 0], ends[:, :-1]), dim=1) - begin
    before = torch.cat((none.expand(-1, chunks, -1, -1), rising[:, :, :-1]), dim=2).cummax(2).values + d
    # later tokens; the maximum is not lowered when a token is passed
    ahead = (falling.amax(2) - begin).flip(1).cummax(1).values.flip(1) + begin
    passed = torch.cat((none.expand(-1, chunks, -1, -1), falling[:, :, 1:]), dim=2).cummax(2).values + d
    past = torch.maximum(earlier[:, :, None], before) - place
    return torch.maximum(torch.maximum(past, torch.maximum(ahead[:, :, None], passed) + place), u + k)
