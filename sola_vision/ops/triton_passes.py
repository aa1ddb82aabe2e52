# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the element-wise passes (`passes.py`). `gpu_passes.py` launches them.

A tile is [T, BLOCK]: T tokens of all images in raster order by contiguous channels. What is masked reads as zero, which
is what lies outside an image. Arithmetic is float32; offsets of values are int64, numbers of tokens int32.
"""

# a kernel is not Python: no types but constexpr
# mypy: ignore-errors

import triton
import triton.language as tl

# tl.sum and tl.zeros are kernels' helpers of Triton's own: interpreted only if Triton was imported for that


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def _look(quarter):
    """Columns and rows from a token to the one that this quarter of the channels looks at; from 4 on it is itself."""
    across = tl.where(quarter == 0, -1, tl.where(quarter == 1, 1, 0))
    along = tl.where(quarter == 2, -1, tl.where(quarter == 3, 1, 0))
    return across, along


@triton.jit
def _within(column, row, width, height):
    return (column >= 0) & (column < width) & (row >= 0) & (row < height)


@triton.jit
def _statistics(v, inside, eps, C: tl.constexpr):
    """Mean [T], deviations from it [T, BLOCK], and one over their size [T]."""
    mean = tl.reduce(v, 1, add) / C
    centred = tl.where(inside, v - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.reduce(centred * centred, 1, add) / C + eps)
    return mean, centred, rstd


@triton.jit
def _parameter(of, channel, inside):
    """A parameter [C] as a tile: read anew from the cache by every row, it needs no exchange between threads."""
    return tl.load(of + tl.broadcast_to(channel, inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def statistics(x, stats, eps, tokens, C: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """x [tokens, C] -> each token's mean and 1 / deviation, stats [2, tokens] in float32."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    channel = tl.arange(0, BLOCK)
    there = token < tokens
    inside = there[:, None] & (channel < C)[None, :]
    at = token.to(tl.int64)[:, None] * C + channel[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean, _, rstd = _statistics(v, inside, eps, C)
    tl.store(stats + token, mean, mask=there)
    tl.store(stats + tokens.to(tl.int64) + token, rstd, mask=there)


@triton.jit(do_not_specialize=["tokens", "made", "height", "rows", "width", "top"])
def norm_shift(
    x, weight, bias, mixes, stats, out, tokens, made, height, rows, width, top,
    C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x [tokens, C] of images with `height` rows -> out [M, made, C], `rows` rows of each from `top` on.

    A program owns one quarter of the channels (or what is beyond them), so that each of its tokens has one neighbour.
    """
    Q: tl.constexpr = C // 4
    REST: tl.constexpr = C % 4
    FIRST: tl.constexpr = 0 if Q > 0 else 4
    LAST: tl.constexpr = 4 if REST > 0 else 3
    quarter = tl.program_id(0) % (LAST - FIRST + 1) + FIRST
    number = tl.program_id(0) // (LAST - FIRST + 1) * T + tl.arange(0, T)  # of the token in out
    lane = tl.arange(0, BLOCK)
    real = lane < Q
    if REST > 0:
        real = lane < tl.where(quarter < 4, Q, REST)
    channel = (quarter * Q + lane)[None, :]

    there = number < made
    column = number % width
    line = number // width
    row = line % rows + top
    token = (line // rows * height + row) * width + column  # in x
    across, along = _look(quarter)
    looked_at = token + along * width + across
    seen = there & _within(column + across, row + along, width, height)
    deviations = stats + tokens.to(tl.int64)
    inside = there[:, None] & real[None, :]
    own = tl.load(x + token.to(tl.int64)[:, None] * C + channel, mask=inside, other=0.0)
    other = tl.load(x + looked_at.to(tl.int64)[:, None] * C + channel, mask=seen[:, None] & real[None, :], other=0.0)
    mean = tl.load(stats + token, mask=there, other=0.0)[:, None]
    rstd = tl.load(deviations + token, mask=there, other=0.0)[:, None]
    other_mean = tl.load(stats + looked_at, mask=seen, other=0.0)[:, None]
    other_rstd = tl.load(deviations + looked_at, mask=seen, other=0.0)[:, None]

    w = _parameter(weight, channel, inside)
    b = _parameter(bias, channel, inside)
    n = (own.to(tl.float32) - mean) * rstd * w + b
    shifted = tl.where(seen[:, None], (other.to(tl.float32) - other_mean) * other_rstd * w + b, 0.0)
    to = number.to(tl.int64)[:, None] * C + channel
    for m in tl.static_range(M):
        mix = _parameter(mixes + m * C, channel, inside)
        tl.store(out + made.to(tl.int64) * (m * C) + to, mix * n + (1.0 - mix) * shifted, mask=inside)


@triton.jit
def _blend(mixes, channel, inside, own, back):
    """What a row of the mixes sends to a token, and its factor in the mix's own gradient."""
    mix = _parameter(mixes, channel, inside)
    own = own.to(tl.float32)
    back = back.to(tl.float32)
    return mix * own + (1.0 - mix) * back, own - back


@triton.jit(do_not_specialize=["tokens", "tiles", "height", "width"])
def norm_shift_backward(
    x, weight, bias, mixes, grad, grad_x, partials, eps, tokens, tiles, height, width,
    C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x [tokens, C], grad [M, tokens, C] -> grad_x [tokens, C], and of each program the sums over its tokens of the
    gradients of weight, bias and mixes, partials [programs, 2 + M, C]. M is at most 3.

    A token t gets a gradient of its own and one from the token that looks at it, r(t). With n the norm, sum_t g(t)
    (n(t) - n(looked at)) = sum_t n(t) (g(t) - g(r(t))), so that no other token's norm is wanted.
    """
    Q: tl.constexpr = C // 4
    channel = tl.arange(0, BLOCK)[None, :]
    quarter = tl.full(channel.shape, 4, tl.int32)
    if Q > 0:
        quarter = channel // Q
    across, along = _look(quarter)
    back = (along * width + across) * -C
    part = tokens.to(tl.int64) * C
    # sums stay apart for each of the T rows until the end: adding is then no matter of other threads
    of_weight = tl.full([T, BLOCK], 0.0, tl.float32)
    of_bias = tl.full([T, BLOCK], 0.0, tl.float32)
    of_mix0 = tl.full([T, BLOCK], 0.0, tl.float32)
    of_mix1 = tl.full([T, BLOCK], 0.0, tl.float32)
    of_mix2 = tl.full([T, BLOCK], 0.0, tl.float32)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = (tile * T + tl.arange(0, T))[:, None]
        inside = (token < tokens) & (channel < C)
        seen = inside & _within(token % width - across, token // width % height - along, width, height)
        at = token.to(tl.int64) * C + channel
        # all that is read comes first, before anything waits for other threads
        v = tl.load(x + at, mask=inside, other=0.0)
        own0 = tl.load(grad + at, mask=inside, other=0.0)
        back0 = tl.load(grad + at + back, mask=seen, other=0.0)
        if M > 1:
            own1 = tl.load(grad + part + at, mask=inside, other=0.0)
            back1 = tl.load(grad + part + at + back, mask=seen, other=0.0)
        if M > 2:
            own2 = tl.load(grad + part * 2 + at, mask=inside, other=0.0)
            back2 = tl.load(grad + part * 2 + at + back, mask=seen, other=0.0)

        _, centred, rstd = _statistics(v.to(tl.float32), inside, eps, C)
        rstd = rstd[:, None]
        normal = tl.where(inside, centred * rstd, 0.0)  # no token, and eps = 0: nothing times infinity
        w = _parameter(weight, channel, inside)
        n = normal * w + _parameter(bias, channel, inside)
        g, difference = _blend(mixes, channel, inside, own0, back0)
        of_mix0 += n * difference
        if M > 1:
            more, difference = _blend(mixes + C, channel, inside, own1, back1)
            of_mix1 += n * difference
            g += more
        if M > 2:
            more, difference = _blend(mixes + 2 * C, channel, inside, own2, back2)
            of_mix2 += n * difference
            g += more
        of_weight += g * normal
        of_bias += g
        g *= w
        level = (tl.reduce(g, 1, add) / C)[:, None]
        slope = (tl.reduce(g * normal, 1, add) / C)[:, None]
        tl.store(grad_x + at, rstd * (g - level - normal * slope), mask=inside)

    lane = tl.arange(0, BLOCK)
    real = lane < C
    to = partials + tl.program_id(0) * ((2 + M) * C) + lane
    tl.store(to, tl.reduce(of_weight, 0, add), mask=real)
    tl.store(to + C, tl.reduce(of_bias, 0, add), mask=real)
    tl.store(to + 2 * C, tl.reduce(of_mix0, 0, add), mask=real)
    if M > 1:
        tl.store(to + 3 * C, tl.reduce(of_mix1, 0, add), mask=real)
    if M > 2:
        tl.store(to + 4 * C, tl.reduce(of_mix2, 0, add), mask=real)


# ---- values of any shape. Triton's own specialisation of `count` (whether 16 divides it) is what lets a thread read
# several values at once: the end of the tensor then never lies between them


@triton.jit
def _place(count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def _open(receptance, at, there):
    return 1.0 / (1.0 + tl.exp(-tl.load(receptance + at, mask=there, other=0.0).to(tl.float32)))


@triton.jit
def _relu(x, at, there):
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    return tl.where(v < 0.0, 0.0, v)  # NaN stays


@triton.jit
def gate(receptance, value, out, count, BLOCK: tl.constexpr):
    at, there = _place(count, BLOCK)
    v = tl.load(value + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, _open(receptance, at, there) * v, mask=there)


@triton.jit
def gate_backward(receptance, value, grad, grad_receptance, grad_value, count, BLOCK: tl.constexpr):
    at, there = _place(count, BLOCK)
    v = tl.load(value + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    opened = _open(receptance, at, there)
    through = g * opened
    tl.store(grad_receptance + at, through * (1.0 - opened) * v, mask=there)
    tl.store(grad_value + at, through, mask=there)


@triton.jit
def gated_sum(residual, receptance, value, out, count, BLOCK: tl.constexpr):
    at, there = _place(count, BLOCK)
    r = tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    v = tl.load(value + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, r + _open(receptance, at, there) * v, mask=there)


@triton.jit
def squared_relu(x, out, count, BLOCK: tl.constexpr):
    at, there = _place(count, BLOCK)
    v = _relu(x, at, there)
    tl.store(out + at, v * v, mask=there)


@triton.jit
def squared_relu_backward(x, grad, out, count, BLOCK: tl.constexpr):
    at, there = _place(count, BLOCK)
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, 2.0 * _relu(x, at, there) * g, mask=there)
