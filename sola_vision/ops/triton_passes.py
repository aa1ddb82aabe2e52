# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the element-wise passes (`passes.py`), launched by `gpu_passes.py`.

A tile is [T, BLOCK]: T tokens of all images in raster order by contiguous channels. Masked values load as zero, the
padding of an image. Arithmetic is float32; offsets of values are int64, indices of tokens int32.
"""

# a kernel is not Python: no types but constexpr
# mypy: ignore-errors

import triton
import triton.language as tl

# tl.sum and tl.zeros are jitted functions of Triton: interpreted only if Triton itself was imported for that


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def _neighbour_offset(quarter):
    """The offset, in columns and rows, from a token to the neighbour of a quarter of the channels; zero from 4 on."""
    across = tl.where(quarter == 0, -1, tl.where(quarter == 1, 1, 0))
    along = tl.where(quarter == 2, -1, tl.where(quarter == 3, 1, 0))
    return across, along


@triton.jit
def _within(column, row, width, height):
    return (column >= 0) & (column < width) & (row >= 0) & (row < height)


@triton.jit
def _statistics(v, mask, eps, C: tl.constexpr):
    """Mean [T], deviations from it [T, BLOCK], and reciprocal standard deviation [T]."""
    mean = tl.reduce(v, 1, add) / C
    centred = tl.where(mask, v - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.reduce(centred * centred, 1, add) / C + eps)
    return mean, centred, rstd


@triton.jit
def _parameter(pointer, channel, mask):
    """Load a parameter [C] as a tile: every row loads it from the cache, which needs no exchange between threads."""
    return tl.load(pointer + tl.broadcast_to(channel, mask.shape), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def statistics(x, stats, eps, tokens, C: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """x [tokens, C] -> each token's mean and 1 / standard deviation, stats [2, tokens] in float32."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    channel = tl.arange(0, BLOCK)
    token_mask = token < tokens
    mask = token_mask[:, None] & (channel < C)[None, :]
    at = token.to(tl.int64)[:, None] * C + channel[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean, _, rstd = _statistics(v, mask, eps, C)
    tl.store(stats + token, mean, mask=token_mask)
    tl.store(stats + tokens.to(tl.int64) + token, rstd, mask=token_mask)


@triton.jit(do_not_specialize=["tokens", "out_tokens", "height", "rows", "width", "top"])
def norm_shift(
    x, weight, bias, mixes, stats, out, tokens, out_tokens, height, rows, width, top,
    C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x [tokens, C] of images with `height` rows -> out [M, out_tokens, C], `rows` rows of each image from `top` on.

    A program owns one quarter of the channels (or the remainder), so that each of its tokens has one neighbour.
    """
    Q: tl.constexpr = C // 4
    REST: tl.constexpr = C % 4
    FIRST: tl.constexpr = 0 if Q > 0 else 4
    LAST: tl.constexpr = 4 if REST > 0 else 3
    quarter = tl.program_id(0) % (LAST - FIRST + 1) + FIRST
    index = tl.program_id(0) // (LAST - FIRST + 1) * T + tl.arange(0, T)  # indices in out
    lane = tl.arange(0, BLOCK)
    lane_mask = lane < Q
    if REST > 0:
        lane_mask = lane < tl.where(quarter < 4, Q, REST)
    channel = (quarter * Q + lane)[None, :]

    token_mask = index < out_tokens
    column = index % width
    image_row = index // width
    row = image_row % rows + top
    token = (image_row // rows * height + row) * width + column  # in x
    across, along = _neighbour_offset(quarter)
    neighbour = token + along * width + across
    neighbour_mask = token_mask & _within(column + across, row + along, width, height)
    deviations = stats + tokens.to(tl.int64)
    mask = token_mask[:, None] & lane_mask[None, :]
    own = tl.load(x + token.to(tl.int64)[:, None] * C + channel, mask=mask, other=0.0)
    other = tl.load(
        x + neighbour.to(tl.int64)[:, None] * C + channel, mask=neighbour_mask[:, None] & lane_mask[None, :], other=0.0
    )
    mean = tl.load(stats + token, mask=token_mask, other=0.0)[:, None]
    rstd = tl.load(deviations + token, mask=token_mask, other=0.0)[:, None]
    other_mean = tl.load(stats + neighbour, mask=neighbour_mask, other=0.0)[:, None]
    other_rstd = tl.load(deviations + neighbour, mask=neighbour_mask, other=0.0)[:, None]

    w = _parameter(weight, channel, mask)
    b = _parameter(bias, channel, mask)
    n = (own.to(tl.float32) - mean) * rstd * w + b
    shifted = tl.where(neighbour_mask[:, None], (other.to(tl.float32) - other_mean) * other_rstd * w + b, 0.0)
    to = index.to(tl.int64)[:, None] * C + channel
    for m in tl.static_range(M):
        mix = _parameter(mixes + m * C, channel, mask)
        tl.store(out + out_tokens.to(tl.int64) * (m * C) + to, mix * n + (1.0 - mix) * shifted, mask=mask)


@triton.jit
def _blend(mixes, channel, mask, own, back):
    """The gradient of a token through one row of the mixes, and its factor in the gradient of the mix."""
    mix = _parameter(mixes, channel, mask)
    own = own.to(tl.float32)
    back = back.to(tl.float32)
    return mix * own + (1.0 - mix) * back, own - back


@triton.jit(do_not_specialize=["tokens", "tiles", "height", "width"])
def norm_shift_backward(
    x, weight, bias, mixes, grad, grad_x, partials, eps, tokens, tiles, height, width,
    C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x [tokens, C], grad [M, tokens, C] -> grad_x [tokens, C], and for each program the sums over its tokens of the
    gradients of weight, bias and mixes, partials [programs, 2 + M, C]. M is at most 3.

    A token t receives its own gradient and that of the token r(t) whose neighbour it is. With n the norm and s(t) the
    neighbour of t, sum_t g(t) (n(t) - n(s(t))) = sum_t n(t) (g(t) - g(r(t))), which needs no other token's norm.
    """
    Q: tl.constexpr = C // 4
    channel = tl.arange(0, BLOCK)[None, :]
    quarter = tl.full(channel.shape, 4, tl.int32)
    if Q > 0:
        quarter = channel // Q
    across, along = _neighbour_offset(quarter)
    back = (along * width + across) * -C
    part = tokens.to(tl.int64) * C
    # each of the T rows has its own sums until the end, so that adding needs no other threads
    grad_weight = tl.full([T, BLOCK], 0.0, tl.float32)
    grad_bias = tl.full([T, BLOCK], 0.0, tl.float32)
    grad_mix0 = tl.full([T, BLOCK], 0.0, tl.float32)
    grad_mix1 = tl.full([T, BLOCK], 0.0, tl.float32)
    grad_mix2 = tl.full([T, BLOCK], 0.0, tl.float32)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = (tile * T + tl.arange(0, T))[:, None]
        mask = (token < tokens) & (channel < C)
        neighbour_mask = mask & _within(token % width - across, token // width % height - along, width, height)
        at = token.to(tl.int64) * C + channel
        # all loads come first, before any reduction synchronizes threads
        v = tl.load(x + at, mask=mask, other=0.0)
        own0 = tl.load(grad + at, mask=mask, other=0.0)
        back0 = tl.load(grad + at + back, mask=neighbour_mask, other=0.0)
        if M > 1:
            own1 = tl.load(grad + part + at, mask=mask, other=0.0)
            back1 = tl.load(grad + part + at + back, mask=neighbour_mask, other=0.0)
        if M > 2:
            own2 = tl.load(grad + part * 2 + at, mask=mask, other=0.0)
            back2 = tl.load(grad + part * 2 + at + back, mask=neighbour_mask, other=0.0)

        _, centred, rstd = _statistics(v.to(tl.float32), mask, eps, C)
        rstd = rstd[:, None]
        normal = tl.where(mask, centred * rstd, 0.0)  # without a token and with eps = 0: 0 times infinity
        w = _parameter(weight, channel, mask)
        n = normal * w + _parameter(bias, channel, mask)
        g, difference = _blend(mixes, channel, mask, own0, back0)
        grad_mix0 += n * difference
        if M > 1:
            more, difference = _blend(mixes + C, channel, mask, own1, back1)
            grad_mix1 += n * difference
            g += more
        if M > 2:
            more, difference = _blend(mixes + 2 * C, channel, mask, own2, back2)
            grad_mix2 += n * difference
            g += more
        grad_weight += g * normal
        grad_bias += g
        g *= w
        level = (tl.reduce(g, 1, add) / C)[:, None]
        slope = (tl.reduce(g * normal, 1, add) / C)[:, None]
        tl.store(grad_x + at, rstd * (g - level - normal * slope), mask=mask)

    lane = tl.arange(0, BLOCK)
    lane_mask = lane < C
    to = partials + tl.program_id(0) * ((2 + M) * C) + lane
    tl.store(to, tl.reduce(grad_weight, 0, add), mask=lane_mask)
    tl.store(to + C, tl.reduce(grad_bias, 0, add), mask=lane_mask)
    tl.store(to + 2 * C, tl.reduce(grad_mix0, 0, add), mask=lane_mask)
    if M > 1:
        tl.store(to + 3 * C, tl.reduce(grad_mix1, 0, add), mask=lane_mask)
    if M > 2:
        tl.store(to + 4 * C, tl.reduce(grad_mix2, 0, add), mask=lane_mask)


# ---- element-wise kernels for any shape. Triton's specialization of `count` (divisible by 16) lets a thread load
# several values at once: the end of the tensor is then never between them


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def _sigmoid(receptance, at, mask):
    return 1.0 / (1.0 + tl.exp(-tl.load(receptance + at, mask=mask, other=0.0).to(tl.float32)))


@triton.jit
def _relu(x, at, mask):
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(v < 0.0, 0.0, v)  # propagates NaN


@triton.jit
def gate(receptance, value, out, count, BLOCK: tl.constexpr):
    at, mask = _block(count, BLOCK)
    v = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, _sigmoid(receptance, at, mask) * v, mask=mask)


@triton.jit
def gate_backward(receptance, value, grad, grad_receptance, grad_value, count, BLOCK: tl.constexpr):
    at, mask = _block(count, BLOCK)
    v = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(receptance, at, mask)
    grad_v = g * sigmoid
    tl.store(grad_receptance + at, grad_v * (1.0 - sigmoid) * v, mask=mask)
    tl.store(grad_value + at, grad_v, mask=mask)


@triton.jit
def gated_sum(residual, receptance, value, out, count, BLOCK: tl.constexpr):
    at, mask = _block(count, BLOCK)
    r = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, r + _sigmoid(receptance, at, mask) * v, mask=mask)


@triton.jit
def squared_relu(x, out, count, BLOCK: tl.constexpr):
    at, mask = _block(count, BLOCK)
    v = _relu(x, at, mask)
    tl.store(out + at, v * v, mask=mask)


@triton.jit
def squared_relu_backward(x, grad, out, count, BLOCK: tl.constexpr):
    at, mask = _block(count, BLOCK)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, 2.0 * _relu(x, at, mask) * g, mask=mask)
