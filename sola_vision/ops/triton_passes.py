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


@triton.jit(do_not_specialize=["tokens"])
def layer_norm(x, weight, bias, out, eps, tokens, C: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """x, out [tokens, C]."""
    token = (tl.program_id(0) * T + tl.arange(0, T))[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens) & (channel < C)
    at = token.to(tl.int64) * C + channel
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    _, centred, rstd = _statistics(v, mask, eps, C)
    n = centred * rstd[:, None] * _parameter(weight, channel, mask) + _parameter(bias, channel, mask)
    tl.store(out + at, n, mask=mask)


@triton.jit
def _input_gradient(g, normal, rstd, C: tl.constexpr):
    """The gradient of the norm's input, from those of its normalised values and these values [T, BLOCK]."""
    level = (tl.reduce(g, 1, add) / C)[:, None]
    slope = (tl.reduce(g * normal, 1, add) / C)[:, None]
    return rstd * (g - level - normal * slope)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def layer_norm_backward(
    x, weight, grad, grad_x, partials, eps, tokens, tiles, C: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """x, grad [tokens, C] -> grad_x [tokens, C], and for each program the sums over its tokens of the gradients of
    weight and bias, partials [programs, 2, C].
    """
    channel = tl.arange(0, BLOCK)[None, :]
    grad_weight = tl.full([T, BLOCK], 0.0, tl.float32)
    grad_bias = tl.full([T, BLOCK], 0.0, tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = (tile * T + tl.arange(0, T))[:, None]
        mask = (token < tokens) & (channel < C)
        at = token.to(tl.int64) * C + channel
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        _, centred, rstd = _statistics(v, mask, eps, C)
        rstd = rstd[:, None]
        normal = tl.where(mask, centred * rstd, 0.0)  # without a token and with eps = 0: 0 times infinity
        grad_weight += g * normal
        grad_bias += g
        g *= _parameter(weight, channel, mask)
        tl.store(grad_x + at, _input_gradient(g, normal, rstd, C), mask=mask)
    lane = tl.arange(0, BLOCK)
    to = partials + tl.program_id(0) * (2 * C) + lane
    tl.store(to, tl.reduce(grad_weight, 0, add), mask=lane < C)
    tl.store(to + C, tl.reduce(grad_bias, 0, add), mask=lane < C)


@triton.jit(do_not_specialize=["tokens", "height", "width"])
def norm_shift(
    x, weight, bias, mixes, stats, out, tokens, height, width,
    C: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """x [tokens, C] -> out [M, tokens, C]. M is at most 3.

    A row of the tile is a vector of neighbouring channels within one quarter (or within the remainder), so that it has
    one token and one neighbour and no lane is idle. The grid, whose vectors are a whole number of tokens, advances
    through x as one: a program keeps its channels, and their parameters stay in registers.
    """
    V: tl.constexpr = C // VECTOR  # vectors in a token
    Q: tl.constexpr = C // 4
    start = tl.program_id(0) * VECTORS
    vector = start % V + tl.arange(0, VECTORS)
    token = start // V + vector // V
    lane = vector % V * VECTOR
    channel = lane[:, None] + tl.arange(0, VECTOR)[None, :]
    w = tl.load(weight + channel).to(tl.float32)
    b = tl.load(bias + channel).to(tl.float32)
    mix0 = tl.load(mixes + channel).to(tl.float32)
    if M > 1:
        mix1 = tl.load(mixes + C + channel).to(tl.float32)
    if M > 2:
        mix2 = tl.load(mixes + 2 * C + channel).to(tl.float32)

    quarter = tl.full(vector.shape, 4, tl.int32)
    if Q > 0:
        quarter = lane // Q
    across, along = _neighbour_offset(quarter)
    offset = along * width + across
    # tokens repeat in rows for the neighbours across, in images for those along; the neighbour is outside of the image
    # for the first tokens of a period, or for the last
    period = tl.where(along == 0, width, width * height)
    place = token % period
    step = tl.num_programs(0) * VECTORS // V
    advance = step % period
    part = tokens.to(tl.int64) * C
    deviations = stats + tokens.to(tl.int64)
    for _ in range(start // V, tokens, step):
        mask = token < tokens
        inside = mask & (place + offset >= 0) & (place + offset < period)
        neighbour = token + offset
        at = token.to(tl.int64)[:, None] * C + channel
        own = tl.load(x + at, mask=mask[:, None], other=0.0)
        other = tl.load(x + neighbour.to(tl.int64)[:, None] * C + channel, mask=inside[:, None], other=0.0)
        mean = tl.load(stats + token, mask=mask, other=0.0)[:, None]
        rstd = tl.load(deviations + token, mask=mask, other=0.0)[:, None]
        other_mean = tl.load(stats + neighbour, mask=inside, other=0.0)[:, None]
        other_rstd = tl.load(deviations + neighbour, mask=inside, other=0.0)[:, None]

        shifted = tl.where(inside[:, None], (other.to(tl.float32) - other_mean) * other_rstd * w + b, 0.0)
        difference = (own.to(tl.float32) - mean) * rstd * w + b - shifted
        tl.store(out + at, mix0 * difference + shifted, mask=mask[:, None])
        if M > 1:
            tl.store(out + part + at, mix1 * difference + shifted, mask=mask[:, None])
        if M > 2:
            tl.store(out + part * 2 + at, mix2 * difference + shifted, mask=mask[:, None])
        token += step
        place += advance
        place = tl.where(place < period, place, place - period)


@triton.jit
def _blend(mixes, channel, mask, own, back):
    """The gradient of a token through one row of the mixes, and its factor in the gradient of the mix."""
    back = back.to(tl.float32)
    difference = own.to(tl.float32) - back
    return _parameter(mixes, channel, mask) * difference + back, difference


@triton.jit(do_not_specialize=["tokens", "tiles", "height", "width"])
def norm_shift_backward(
    x, weight, bias, mixes, grad, residual, grad_x, partials, eps, tokens, tiles, height, width,
    C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """x [tokens, C], grad [M, tokens, C] -> grad_x [tokens, C], and for each program the sums over its tokens of the
    gradients of weight, bias and mixes, partials [programs, 2 + M, C]. M is at most 3. RESIDUAL adds another gradient
    of x, residual [tokens, C], to grad_x.

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
        g = _input_gradient(g * w, normal, rstd, C)
        if RESIDUAL:
            g += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + at, g, mask=mask)

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
# several values at once: the end of the tensor is then never between them. SCALED kernels multiply each image by one of
# its `factors`; `count` is then that of an image


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def _block_of_image(factors, count, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    """A block within one image, and the image's factor."""
    if SCALED:
        blocks = (count + BLOCK - 1) // BLOCK
        image = (tl.program_id(0) // blocks).to(tl.int64)
        at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        return image * count + at, at < count, tl.load(factors + image).to(tl.float32)
    else:
        at, mask = _block(count, BLOCK)
        return at, mask, 1.0


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
def gate_backward(
    receptance, value, grad, factors, grad_receptance, grad_value, count, BLOCK: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    at, mask, factor = _block_of_image(factors, count, BLOCK, SCALED)
    v = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * factor
    sigmoid = _sigmoid(receptance, at, mask)
    grad_v = g * sigmoid
    tl.store(grad_receptance + at, grad_v * (1.0 - sigmoid) * v, mask=mask)
    tl.store(grad_value + at, grad_v, mask=mask)


@triton.jit
def residual_sum(
    residual, receptance, value, factors, out, count, BLOCK: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    at, mask, factor = _block_of_image(factors, count, BLOCK, SCALED)
    r = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        v = _sigmoid(receptance, at, mask) * v
    tl.store(out + at, r + v * factor, mask=mask)


@triton.jit
def scaled(x, factors, out, count, BLOCK: tl.constexpr):
    at, mask, factor = _block_of_image(factors, count, BLOCK, True)
    tl.store(out + at, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor, mask=mask)


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
