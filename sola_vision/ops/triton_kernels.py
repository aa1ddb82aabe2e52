# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of Bi-WKV: forward and backward in three phases over chunks of L tokens. `gpu.py` launches them.

With lam = e^(-w/N) and s_i = e^(k_i) (v_i, 1), eq. 9 is the first sum over the second of A + R + e^u s_t, where A and R
are exclusive scans, A_(t+1) = lam A_t + s_t and R_(t-1) = lam R_t + s_t. (1) Every chunk sums its tokens as its
neighbours see them, (2) a small scan over chunks turns sums into the states that enter each chunk, (3) every chunk
scans its tokens and writes. The backward does the same with (h, q) = (g, g y) / D, D the denominator, since the mixing
matrix is symmetric.

B batch, N tokens, C channels; a program owns a tile [L, BLOCK] of one image, a lane one channel, and every reading is
coalesced along channels. What is made of tiles, rows and states is in `triton_scans.py`. Sums and states: exponents
int32 [2, B, chunks, C], pairs float32 [2, 2, B, chunks, C], first index left or right, second a or b.
"""

# a kernel is not Python: no unpacking, no types but constexpr, and tuples that grow
# mypy: ignore-errors
# ruff: noqa: SIM108

import triton
import triton.language as tl

from sola_vision.ops import triton_scans as scans


@triton.jit
def _chunk_sums(
    k, value, tokens, there, exponents, pairs, state, stride, inside, fade, high, low, reference,
    L: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, high, low = scans.whole(fade, high, low, WIDE)
    n, m = scans.weights(k, there, reference, WIDE)
    x = m * tl.load(value + tokens, mask=there, other=0.0).to(tl.float32)
    E, a, b = scans.nothing(reference, WIDE)
    _n, _x, _e, En, ex, ee = scans.scan(E, a, b, n, x, m, fade, high, low, L, BLOCK, False, WIDE)
    En, ex, ee = scans.normal(En, ex, ee, ee)
    scans.store_state(exponents, pairs, state, 0, stride, inside, En, ex, ee)
    _n, _x, _e, En, ex, ee = scans.scan(E, a, b, n, x, m, fade, high, low, L, BLOCK, True, WIDE)
    En, ex, ee = scans.normal(En, ex, ee, ee)
    scans.store_state(exponents, pairs, state, 1, stride, inside, En, ex, ee)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def chunk_sums(
    decay, key, value, exponents, pairs, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 1: each chunk's tokens as the first token after it (left) and the last before it (right) see them."""
    channel, inside, tokens, there, state = scans.place(chunks, num_tokens, C, L, BLOCK)
    stride = stride.to(tl.int64)
    fade, high, low = scans.fade_of_step(decay, channel, inside, num_tokens)
    k = tl.load(key + tokens, mask=there, other=0.0).to(tl.float32)
    reference, wide = scans.survey(k, there, fade, L, BLOCK)
    if scans.any_lane(wide & inside):
        _chunk_sums(
            k, value, tokens, there, exponents, pairs, state, stride, inside,
            fade, high, low, reference, L, BLOCK, True,
        )  # fmt: skip
    else:
        _chunk_sums(
            k, value, tokens, there, exponents, pairs, state, stride, inside,
            fade, high, low, reference, L, BLOCK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "count", "group_length", "groups", "steps", "num_tokens"])
def scan_states(
    decay, in_exponents, in_pairs, carry_exponents, carry_pairs, out_exponents, out_pairs, batch, count, group_length,
    groups, steps, num_tokens, C: tl.constexpr, BLOCK: tl.constexpr,
    CARRY: tl.constexpr, TOTALS: tl.constexpr, BY_B: tl.constexpr,
):  # fmt: skip
    """Phase 2: the state before each of `count` sums, `steps` tokens apart, in groups of `group_length`.

    A group starts from its entering state (CARRY) or from nothing, and writes the state before each sum, or only the
    one behind its last (TOTALS). A long row takes three launches: totals of groups, states before groups, states before
    sums. The pair's size is b where b is a denominator (BY_B), else the larger of the two. Float64 inside.
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    group = program // blocks % groups
    image = program // blocks // groups  # [2, B]
    side = image // batch
    image = (image % batch).to(tl.int64)
    stride = batch.to(tl.int64) * count * C
    group_stride = batch.to(tl.int64) * groups * C
    group_state = (image * groups + group) * C + channel
    fade, factor = scans.fade_over(decay, channel, inside, steps, num_tokens)

    E = tl.full(channel.shape, scans.EMPTY, tl.int32)
    a = tl.full(channel.shape, 0.0, tl.float64)
    b = tl.full(channel.shape, 0.0, tl.float64)
    if CARRY:
        E, a, b = scans.load_state(carry_exponents, carry_pairs, group_state, side, group_stride, inside)
        a = a.to(tl.float64)
        b = b.to(tl.float64)
    first = group * group_length
    length = tl.minimum(count - first, group_length)
    for i in range(0, length):
        index = first + tl.where(side == 0, i, length - 1 - i)
        state = (image * count + index) * C + channel
        n, a1, b1 = scans.load_state(in_exponents, in_pairs, state, side, stride, inside)
        if not TOTALS:
            scans.store_state(out_exponents, out_pairs, state, side, stride, inside, E, a, b)
        E = tl.maximum(E + fade, scans.EMPTY)
        top = tl.maximum(E, n)
        old = scans.power(E - top).to(tl.float64) * factor
        new = scans.power(n - top).to(tl.float64)
        a = a * old + a1.to(tl.float64) * new
        b = b * old + b1.to(tl.float64) * new
        if BY_B:
            size = b
        else:
            size = tl.maximum(tl.abs(a), tl.abs(b))
        E, a, b = scans.normal(top, a, b, size)
    if TOTALS:
        scans.store_state(out_exponents, out_pairs, group_state, side, group_stride, inside, E, a, b)


@triton.jit
def _outputs(
    k, value, out, tokens, there, exponents, pairs, state, stride, inside, own_n, own_m, fade, high, low, reference,
    L: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, high, low = scans.whole(fade, high, low, WIDE)
    own_n, own_m, _ = scans.whole(own_n, own_m, own_m, WIDE)
    n, m = scans.weights(k, there, reference, WIDE)
    x = m * tl.load(value + tokens, mask=there, other=0.0).to(tl.float32)
    En, ex, ee = scans.enter(exponents, pairs, state, 1, stride, inside, reference, WIDE)
    Rn, rx, re, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, True, WIDE)
    En, ex, ee = scans.enter(exponents, pairs, state, 0, stride, inside, reference, WIDE)
    An, ax, ae, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, False, WIDE)
    own = own_m[None, :]
    _n, num, den, _e = scans.total(An, ax, ae, Rn, rx, re, n + own_n, x * own, m * own, WIDE)
    tl.store(out + tokens, (num / den).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def outputs(
    decay, bonus, key, value, out, exponents, pairs, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 3: every token's eq. 9, from the states that enter its chunk."""
    channel, inside, tokens, there, state = scans.place(chunks, num_tokens, C, L, BLOCK)
    stride = stride.to(tl.int64)
    fade, high, low = scans.fade_of_step(decay, channel, inside, num_tokens)
    own_n, own_m = scans.split(tl.load(bonus + channel, mask=inside, other=0.0).to(tl.float32))
    k = tl.load(key + tokens, mask=there, other=0.0).to(tl.float32)
    reference, wide = scans.survey(k, there, fade, L, BLOCK)
    wide = wide | scans.far(own_n, exponents, state, stride, inside, reference)
    if scans.any_lane(wide & inside):
        _outputs(
            k, value, out, tokens, there, exponents, pairs, state, stride, inside,
            own_n, own_m, fade, high, low, reference, L, BLOCK, True,
        )  # fmt: skip
    else:
        _outputs(
            k, value, out, tokens, there, exponents, pairs, state, stride, inside,
            own_n, own_m, fade, high, low, reference, L, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _backward(
    k, value, grad, grad_key, grad_value, partials, tokens, there, exponents, pairs, back_exponents, back_pairs,
    state, stride, inside, own_n, own_m, fade, high, low, reference,
    L: tl.constexpr, BLOCK: tl.constexpr, WRITE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, high, low = scans.whole(fade, high, low, WIDE)
    own_n, own_m, _ = scans.whole(own_n, own_m, own_m, WIDE)
    n, m = scans.weights(k, there, reference, WIDE)
    v = tl.load(value + tokens, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + tokens, mask=there, other=0.0).to(tl.float32)
    x = m * v
    En, ex, ee = scans.enter(exponents, pairs, state, 1, stride, inside, reference, WIDE)
    Rn, rx, re, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, True, WIDE)
    En, ex, ee = scans.enter(exponents, pairs, state, 0, stride, inside, reference, WIDE)
    An, ax, ae, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, False, WIDE)
    own = own_m[None, :]
    top, num, den, weight = scans.total(An, ax, ae, Rn, rx, re, n + own_n, x * own, m * own, WIDE)
    # behind the row's end there may be no denominator at all
    scale = 1.0 / tl.where(there, den, 1.0)
    y = num * scale
    h = g * scale
    q = h * y
    hn = -top
    if WIDE:
        hn = tl.where(there, hn, scans.EMPTY)

    if WRITE:
        En, eh, eq = scans.enter(back_exponents, back_pairs, state, 0, stride, inside, -reference, WIDE)
    else:
        En, eh, eq = scans.nothing(-reference, WIDE)
    Fn, fh, fq, Sn, sh, sq = scans.scan(En, eh, eq, hn, h, q, fade, high, low, L, BLOCK, False, WIDE)
    if not WRITE:
        Sn, sh, sq = scans.normal(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        scans.store_state(back_exponents, back_pairs, state, 0, stride, inside, Sn, sh, sq)
    if WRITE:
        En, eh, eq = scans.enter(back_exponents, back_pairs, state, 1, stride, inside, -reference, WIDE)
    else:
        En, eh, eq = scans.nothing(-reference, WIDE)
    Bn, bh, bq, Sn, sh, sq = scans.scan(En, eh, eq, hn, h, q, fade, high, low, L, BLOCK, True, WIDE)
    if not WRITE:
        Sn, sh, sq = scans.normal(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        scans.store_state(back_exponents, back_pairs, state, 1, stride, inside, Sn, sh, sq)

    if WRITE:
        # H and Q of the docstring's symmetric matrix, times e^k
        left = scans.meeting(n, Fn, WIDE) * m
        right = scans.meeting(n, Bn, WIDE) * m
        gv = left * fh + right * bh + weight * h
        gq = left * fq + right * bq + weight * q
        tl.store(grad_value + tokens, gv.to(grad_value.dtype.element_ty), mask=there)
        tl.store(grad_key + tokens, (v * gv - gq).to(grad_key.dtype.element_ty), mask=there)
        gu = scans.fold(weight * h * (v - y), scans.plus, L, BLOCK)
        # every token between two others sees the left state of one and the right state of the other
        between = scans.meeting(An + fade, Bn, WIDE) * (ax * bh - ae * bq)
        between += scans.meeting(Rn + fade, Fn, WIDE) * (rx * fh - re * fq)
        gw = -high * scans.fold(tl.where(there, between, 0.0), scans.plus, L, BLOCK)
        tl.store(partials + state, gw, mask=inside)
        tl.store(partials + stride + state, gu, mask=inside)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def backward(
    decay, bonus, key, value, grad, grad_key, grad_value, partials, exponents, pairs, back_exponents, back_pairs,
    chunks, num_tokens, stride, C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """The backward's phases 1 and 3 (WRITE): a chunk's sums of (h, q); the gradients, gw and gu as a part a chunk.

    partials float32 [2, B, chunks, C]: this chunk's part of N gw and of gu.
    """
    channel, inside, tokens, there, state = scans.place(chunks, num_tokens, C, L, BLOCK)
    stride = stride.to(tl.int64)
    fade, high, low = scans.fade_of_step(decay, channel, inside, num_tokens)
    own_n, own_m = scans.split(tl.load(bonus + channel, mask=inside, other=0.0).to(tl.float32))
    k = tl.load(key + tokens, mask=there, other=0.0).to(tl.float32)
    reference, wide = scans.survey(k, there, fade, L, BLOCK)
    wide = wide | scans.far(own_n, exponents, state, stride, inside, reference)
    if scans.any_lane(wide & inside):
        _backward(
            k, value, grad, grad_key, grad_value, partials, tokens, there, exponents, pairs, back_exponents, back_pairs,
            state, stride, inside, own_n, own_m, fade, high, low, reference, L, BLOCK, WRITE, True,
        )  # fmt: skip
    else:
        _backward(
            k, value, grad, grad_key, grad_value, partials, tokens, there, exponents, pairs, back_exponents, back_pairs,
            state, stride, inside, own_n, own_m, fade, high, low, reference, L, BLOCK, WRITE, False,
        )  # fmt: skip
