# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of Bi-WKV: forward and backward in three phases over chunks of L tokens. `gpu.py` launches them.

With lam = e^(-w/N) and s_i = e^(k_i) (v_i, 1), eq. 9 is the first sum over the second of A + R + e^u s_t, where A and R
are exclusive scans, A_(t+1) = lam A_t + s_t and R_(t-1) = lam R_t + s_t. (1) Every chunk sums its tokens as its
neighbours see them, (2) a small scan over chunks turns sums into the states that enter each chunk, (3) every chunk
scans its tokens and writes. The backward does the same with (h, q) = (g, g y) / D, D the denominator, since the mixing
matrix is symmetric.

B batch, N tokens, C channels; a program owns a tile [L, BLOCK] of one image, a lane one channel, and every reading is
coalesced along channels. MASKED where tiles go beyond N or C. What is made of tiles, rows and states is in
`triton_scans.py`. Sums and states: float32 [3, 2, B, chunks, C], exponents (as int32), a, b of the left and the right.
"""

# a kernel is not Python: no unpacking, no types but constexpr, and tuples that grow
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from sola_vision.ops import triton_scans as scans


@triton.jit
def _chunk_sums(
    k, v, there, states, state, stride, inside, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, lam = scans.whole(fade, lam, WIDE)
    n, m = scans.weights(k, there, reference, MASKED, WIDE)
    x = m * v
    E, a, b = scans.nothing(reference, WIDE)
    _n, _x, _e, En, ex, ee = scans.scan(E, a, b, n, x, m, fade, lam, count, L, BLOCK, False, WIDE)
    En, ex, ee = scans.normal(En, ex, ee, ee)
    scans.store_state(states, state, 0, stride, inside, En, ex, ee)
    _n, _x, _e, En, ex, ee = scans.scan(E, a, b, n, x, m, fade, lam, count, L, BLOCK, True, WIDE)
    En, ex, ee = scans.normal(En, ex, ee, ee)
    scans.store_state(states, state, 1, stride, inside, En, ex, ee)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def chunk_sums(
    decay, key, value, step, references, states, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Phase 1: each chunk's tokens as the first token after it (left) and the last before it (right) see them.

    Leaves for the other kernels lam in step, float32 [2, C] (exponent as int32, mantissa), and in references, int32
    [B, chunks, C], each chunk's exponent or that it is too wide for one.
    """
    channel, inside, tokens, there, state, count = scans.place(chunks, num_tokens, C, L, BLOCK, False)
    stride = stride.to(tl.int64)
    k = scans.load_tile(key + tokens, there, MASKED).to(tl.float32)
    v = scans.load_tile(value + tokens, there, MASKED).to(tl.float32)
    fade, lam = scans.fade_of_step(decay, channel, inside, num_tokens)
    first = inside & (state < C)
    tl.store((step + channel).to(tl.pointer_type(tl.int32)), fade, mask=first)
    tl.store(step + C + channel, lam, mask=first)
    reference, wide = scans.survey(k, there, fade, L, BLOCK, MASKED)
    scans.store_reference(references + state, reference, wide, inside)
    if scans.any_lane(wide & inside):
        # again, so that the narrow path has nothing to put aside for the wide one, which needs all registers
        k = scans.load_tile(key + tokens, there, MASKED).to(tl.float32)
        v = scans.load_tile(value + tokens, there, MASKED).to(tl.float32)
        _chunk_sums(
            k, v, there, states, state, stride, inside, fade, lam, reference, count, L, BLOCK, MASKED, True
        )  # fmt: skip
    else:
        _chunk_sums(
            k, v, there, states, state, stride, inside, fade, lam, reference, count, L, BLOCK, MASKED, False
        )  # fmt: skip


@triton.jit
def _behind(E, a, b, n, a1, b1, fade, factor):
    """The state behind a sum (n, a1, b1), from the one before it; the state's pair is float64. Exponents do not wait
    for pairs, so that one multiply-add a sum is all that goes from sum to sum.
    """
    faded = tl.maximum(E + fade, scans.EMPTY)
    top = tl.maximum(faded, n)
    old = scans.power64(faded - top) * factor
    new = scans.power64(n - top)
    return top, tl.fma(a, old, a1.to(tl.float64) * new), tl.fma(b, old, b1.to(tl.float64) * new)


@triton.jit(do_not_specialize=["batch", "count", "group_length", "groups", "steps", "num_tokens"])
def scan_states(
    decay, sums, carry, out, batch, count, group_length, groups, steps, num_tokens,
    C: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    CARRY: tl.constexpr, TOTALS: tl.constexpr, BY_B: tl.constexpr,
):  # fmt: skip
    """Phase 2: the state before each of `count` sums, `steps` tokens apart, in groups of `group_length`.

    A group starts from its entering state (CARRY) or from nothing, and writes the state before each sum, or only the
    one behind its last (TOTALS); states may take the place of the sums. A long row takes three launches: totals of
    groups, states before groups, states before sums. The pair's size is b where b is a denominator (BY_B), else the
    larger of the two. Float64 inside; AHEAD sums are read while those before them are added.
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
        E, a, b = scans.load_state(carry, group_state, side, group_stride, inside)
        a = a.to(tl.float64)
        b = b.to(tl.float64)
    first = group * group_length
    length = tl.minimum(count - first, group_length)
    start = (image * count + tl.where(side == 0, first, first + length - 1)) * C + channel
    hop = tl.where(side == 0, C, -C)
    ahead = tl.arange(0, AHEAD)[:, None]
    places = tl.multiple_of(start[None, :] + ahead * hop, (1, 1))  # as in scans.place
    there = inside[None, :] & (ahead < length)
    n, a1, b1 = scans.load_state(sums, places, side, stride, there)
    for i in range(0, length, AHEAD):
        next_places = tl.multiple_of(places + AHEAD * hop, (1, 1))
        next_there = inside[None, :] & (ahead < length - i - AHEAD)
        next_n, next_a1, next_b1 = scans.load_state(sums, next_places, side, stride, next_there)
        ns = scans.rows_of(n, AHEAD, BLOCK)
        a1s = scans.rows_of(a1, AHEAD, BLOCK)
        b1s = scans.rows_of(b1, AHEAD, BLOCK)
        before_n = ()
        before_a = ()
        before_b = ()
        for j in tl.static_range(AHEAD):
            before_n = before_n + (E,)
            before_a = before_a + (a.to(tl.float32),)
            before_b = before_b + (b.to(tl.float32),)
            top, next_a, next_b = _behind(E, a, b, ns[j], a1s[j], b1s[j], fade, factor)
            if TOTALS:  # behind the group's last sum nothing may fade
                more = i + j < length
                top = tl.where(more, top, E)
                next_a = tl.where(more, next_a, a)
                next_b = tl.where(more, next_b, b)
            E = top
            a = next_a
            b = next_b
        # a pair leaves [1, 2) by a factor of two a sum at the most
        size = b
        if not BY_B:
            size = tl.maximum(tl.abs(a), tl.abs(b))
        E, a, b = scans.normal(E, a, b, size)
        if not TOTALS:
            En = scans.tile_of(before_n, AHEAD, BLOCK, False)
            ea = scans.tile_of(before_a, AHEAD, BLOCK, False)
            eb = scans.tile_of(before_b, AHEAD, BLOCK, False)
            scans.store_state(out, places, side, stride, there, En, ea, eb)
        places = next_places
        there = next_there
        n = next_n
        a1 = next_a1
        b1 = next_b1
    if TOTALS:
        scans.store_state(out, group_state, side, group_stride, inside, E, a, b)


@triton.jit
def _read(
    k, v, there, left, right, own_n, own_m, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What every token reads: its weight (n, m), the states before it from the left and from the right, and
    with its own part (the last) numerator and denominator of eq. 9 at one exponent.
    """
    n, m = scans.weights(k, there, reference, MASKED, WIDE)
    x = m * v
    En, ex, ee = scans.enter(right, reference, WIDE)
    Rn, rx, re, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, lam, count, L, BLOCK, True, WIDE)
    En, ex, ee = scans.enter(left, reference, WIDE)
    An, ax, ae, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, lam, count, L, BLOCK, False, WIDE)
    own = own_m[None, :]
    top, num, den, weight = scans.total(An, ax, ae, Rn, rx, re, n + own_n, x * own, m * own, WIDE)
    return n, m, An, ax, ae, Rn, rx, re, top, num, den, weight


@triton.jit
def _outputs(
    k, v, out, tokens, there, left, right, own_n, own_m, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, lam = scans.whole(fade, lam, WIDE)
    own_n, own_m = scans.whole(own_n, own_m, WIDE)
    _n, _m, _An, _ax, _ae, _Rn, _rx, _re, _top, num, den, _own = _read(
        k, v, there, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WIDE
    )  # fmt: skip
    scans.store_tile(out + tokens, num * scans.reciprocal(den), there, MASKED)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def outputs(
    step, references, bonus, key, value, out, states, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Phase 3: every token's eq. 9, from the states that enter its chunk."""
    channel, inside, tokens, there, state, count = scans.place(chunks, num_tokens, C, L, BLOCK, True)
    stride = stride.to(tl.int64)
    k = scans.load_tile(key + tokens, there, MASKED).to(tl.float32)
    v = scans.load_tile(value + tokens, there, MASKED).to(tl.float32)
    reference, wide = scans.load_reference(references + state, inside)
    fade, lam = scans.load_step(step, channel, inside, C)
    own_n, own_m = scans.split(tl.load(bonus + channel, mask=inside, other=0.0).to(tl.float32))
    left = scans.load_state(states, state, 0, stride, inside)
    right = scans.load_state(states, state, 1, stride, inside)
    wide = wide | scans.far(own_n, left, right, reference)
    if scans.any_lane(wide & inside):
        k = scans.load_tile(key + tokens, there, MASKED).to(tl.float32)  # again, as in chunk_sums
        v = scans.load_tile(value + tokens, there, MASKED).to(tl.float32)
        _outputs(
            k, v, out, tokens, there, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, True
        )  # fmt: skip
    else:
        _outputs(
            k, v, out, tokens, there, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, False
        )  # fmt: skip


@triton.jit
def _backward(
    k, v, g, grad_key, grad_value, partials, tokens, there, left, right, back_left, back_right, back_states, state,
    stride, inside, own_n, own_m, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WRITE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, lam = scans.whole(fade, lam, WIDE)
    own_n, own_m = scans.whole(own_n, own_m, WIDE)
    n, m, An, ax, ae, Rn, rx, re, top, num, den, weight = _read(
        k, v, there, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WIDE
    )  # fmt: skip
    # behind the row's end there may be no denominator at all
    scale = scans.reciprocal(scans.where_there(there, den, 1.0, MASKED))
    y = num * scale
    h = g * scale
    q = h * y
    hn = -top
    if WIDE:
        hn = scans.where_there(there, hn, scans.EMPTY, MASKED)

    En, eh, eq = scans.enter(back_right, -reference, WIDE)
    Bn, bh, bq, Sn, sh, sq = scans.scan(En, eh, eq, hn, h, q, fade, lam, count, L, BLOCK, True, WIDE)
    if WRITE:
        # every token between two others sees the left state of one and the right state of the other
        if WIDE:
            meeting = scans.where_there(there, scans.meeting(An + fade, Bn, WIDE), 0.0, MASKED)
            ax = ax * meeting
            ae = ae * meeting
        gw = scans.sum_of_products(ax, bh, ae, bq, L, BLOCK, True)
    else:
        Sn, sh, sq = scans.normal(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        scans.store_state(back_states, state, 1, stride, inside, Sn, sh, sq)
    En, eh, eq = scans.enter(back_left, -reference, WIDE)
    Fn, fh, fq, Sn, sh, sq = scans.scan(En, eh, eq, hn, h, q, fade, lam, count, L, BLOCK, False, WIDE)
    if not WRITE:
        Sn, sh, sq = scans.normal(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        scans.store_state(back_states, state, 0, stride, inside, Sn, sh, sq)

    if WRITE:
        # H and Q of the docstring's symmetric matrix, times e^k
        left = scans.meeting(n, Fn, WIDE) * m
        right = scans.meeting(n, Bn, WIDE) * m
        gv = left * fh + right * bh + weight * h
        gq = left * fq + right * bq + weight * q
        scans.store_tile(grad_value + tokens, gv, there, MASKED)
        scans.store_tile(grad_key + tokens, v * gv - gq, there, MASKED)
        gu = scans.sum_of_products(weight * h, v, weight, q, L, BLOCK, False)
        if WIDE:
            meeting = scans.where_there(there, scans.meeting(Rn + fade, Fn, WIDE), 0.0, MASKED)
            rx = rx * meeting
            re = re * meeting
        gw = -lam * (gw + scans.sum_of_products(rx, fh, re, fq, L, BLOCK, False))
        tl.store(partials + state, gw, mask=inside)
        tl.store(partials + stride + state, gu, mask=inside)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def backward(
    step, references, bonus, key, value, grad, grad_key, grad_value, partials, states, back_states,
    chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """The backward's phases 1 and 3 (WRITE): a chunk's sums of (h, q); the gradients, gw and gu as a part a chunk.

    partials float32 [2, B, chunks, C]: this chunk's part of N gw and of gu.
    """
    channel, inside, tokens, there, state, count = scans.place(chunks, num_tokens, C, L, BLOCK, not WRITE)
    stride = stride.to(tl.int64)
    k = scans.load_tile(key + tokens, there, MASKED).to(tl.float32)
    v = scans.load_tile(value + tokens, there, MASKED).to(tl.float32)
    g = scans.load_tile(grad + tokens, there, MASKED).to(tl.float32)
    reference, wide = scans.load_reference(references + state, inside)
    if WRITE:
        back_left = scans.load_state(back_states, state, 0, stride, inside)
        back_right = scans.load_state(back_states, state, 1, stride, inside)
    else:
        back_left = scans.nothing(channel, True)
        back_right = scans.nothing(channel, True)
    fade, lam = scans.load_step(step, channel, inside, C)
    own_n, own_m = scans.split(tl.load(bonus + channel, mask=inside, other=0.0).to(tl.float32))
    left = scans.load_state(states, state, 0, stride, inside)
    right = scans.load_state(states, state, 1, stride, inside)
    wide = wide | scans.far(own_n, left, right, reference)
    if scans.any_lane(wide & inside):
        k = scans.load_tile(key + tokens, there, MASKED).to(tl.float32)  # again, as in chunk_sums
        v = scans.load_tile(value + tokens, there, MASKED).to(tl.float32)
        g = scans.load_tile(grad + tokens, there, MASKED).to(tl.float32)
        _backward(
            k, v, g, grad_key, grad_value, partials, tokens, there, left, right, back_left, back_right, back_states,
            state, stride, inside, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WRITE, True,
        )  # fmt: skip
    else:
        _backward(
            k, v, g, grad_key, grad_value, partials, tokens, there, left, right, back_left, back_right, back_states,
            state, stride, inside, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WRITE, False,
        )  # fmt: skip


@triton.jit
def _sum_rows(first, count, inside, C: tl.constexpr, AHEAD: tl.constexpr):
    """The sum of `count` rows of C numbers, one after the other in float64; AHEAD of them are read at once."""
    total = tl.full(inside.shape, 0.0, tl.float64)
    for i in range(0, count, AHEAD):
        rows = ()
        for j in tl.static_range(AHEAD):
            rows = rows + (tl.load(first + (i + j) * C, mask=inside & (i + j < count), other=0.0),)
        for j in tl.static_range(AHEAD):
            total += rows[j].to(tl.float64)
    return total


@triton.jit(do_not_specialize=["chunks"])
def sum_partials(partials, out, chunks, C: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Parts of one image's gw or gu, [chunks, C] float32, as one row of float64: [2 B, C] in the end."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    image = (program // blocks).to(tl.int64)  # [2, B]
    total = _sum_rows(partials + image * chunks * C + channel, chunks, channel < C, C, AHEAD)
    tl.store(out + image * C + channel, total, mask=channel < C)


@triton.jit(do_not_specialize=["batch", "num_tokens"])
def sum_images(
    images, grad_decay, grad_bonus, batch, num_tokens, C: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    """Rows of every image, [2, B, C] float64 of N gw and of gu, as gw and gu [C]."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(0) // blocks
    total = _sum_rows(images + which.to(tl.int64) * batch * C + channel, batch, channel < C, C, AHEAD)
    if which == 0:
        tl.store(grad_decay + channel, (total / num_tokens).to(grad_decay.dtype.element_ty), mask=channel < C)
    else:
        tl.store(grad_bonus + channel, total.to(grad_bonus.dtype.element_ty), mask=channel < C)
