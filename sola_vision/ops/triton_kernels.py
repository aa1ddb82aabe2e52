# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of Bi-WKV, launched by `gpu.py`: forward and backward in three phases over chunks of L tokens.

With lam = e^(-w/N) and s_i = e^(k_i) (v_i, 1), eq. 9 is the first sum over the second of A + R + e^u s_t, where A and R
are exclusive scans, A_(t+1) = lam A_t + s_t and R_(t-1) = lam R_t + s_t. (1) Every chunk sums its tokens, decayed up to
either end, (2) a small scan over chunks turns the sums into the states that enter each chunk, (3) every chunk scans its
tokens and writes the outputs. The backward does the same with (h, q) = (g, g y) / D, D the denominator, since the
mixing matrix is symmetric.

B batch, N tokens, C channels; a program owns a tile [L, BLOCK] of one image, a lane one channel, and all loads are
coalesced along channels. MASKED if tiles extend beyond N or C. Functions of tiles, rows and states are in
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
    k, v, mask, states, state, stride, lane_mask, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, lam = scans.adapt_factor(fade, lam, WIDE)
    n, m = scans.weights(k, mask, reference, MASKED, WIDE)
    x = m * v
    E, a, b = scans.empty_state(reference, WIDE)
    _n, _x, _e, En, ex, ee = scans.scan(E, a, b, n, x, m, fade, lam, count, L, BLOCK, False, WIDE)
    En, ex, ee = scans.normalize(En, ex, ee, ee)
    scans.store_state(states, state, 0, stride, lane_mask, En, ex, ee)
    _n, _x, _e, En, ex, ee = scans.scan(E, a, b, n, x, m, fade, lam, count, L, BLOCK, True, WIDE)
    En, ex, ee = scans.normalize(En, ex, ee, ee)
    scans.store_state(states, state, 1, stride, lane_mask, En, ex, ee)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def chunk_sums(
    decay, key, value, step, references, states, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Phase 1: each chunk's sums, decayed up to the first token after it (left) and the last before it (right).

    Also stores, for the other kernels, lam in step, float32 [2, C] (exponent as int32, mantissa), and in references,
    int32 [B, chunks, C], each chunk's exponent or TOO_WIDE.
    """
    channel, lane_mask, tokens, mask, state, count = scans.locate(chunks, num_tokens, C, L, BLOCK, False)
    stride = stride.to(tl.int64)
    k = scans.load_tile(key + tokens, mask, MASKED).to(tl.float32)
    v = scans.load_tile(value + tokens, mask, MASKED).to(tl.float32)
    fade, lam = scans.fade_of_step(decay, channel, lane_mask, num_tokens)
    first = lane_mask & (state < C)
    tl.store((step + channel).to(tl.pointer_type(tl.int32)), fade, mask=first)
    tl.store(step + C + channel, lam, mask=first)
    reference, wide = scans.reference_exponent(k, mask, fade, L, BLOCK, MASKED)
    scans.store_reference(references + state, reference, wide, lane_mask)
    if scans.any_lane(wide & lane_mask):
        # loaded again, so that the narrow path keeps no registers alive for the wide one, which needs all of them
        k = scans.load_tile(key + tokens, mask, MASKED).to(tl.float32)
        v = scans.load_tile(value + tokens, mask, MASKED).to(tl.float32)
        _chunk_sums(
            k, v, mask, states, state, stride, lane_mask, fade, lam, reference, count, L, BLOCK, MASKED, True
        )  # fmt: skip
    else:
        _chunk_sums(
            k, v, mask, states, state, stride, lane_mask, fade, lam, reference, count, L, BLOCK, MASKED, False
        )  # fmt: skip


@triton.jit
def _append(E, a, b, n, a1, b1, fade, factor):
    """The state after a sum (n, a1, b1), from the state before it, whose pair is float64. Exponents do not depend on
    pairs, so that the chain of dependencies is one multiply-add per sum.
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

    A group starts from its entering state (CARRY) or an empty one, and writes the state before each sum, or only the
    one after its last (TOTALS); states may overwrite the sums. A long row needs three launches: totals of groups,
    states before groups, states before sums. The pair is normalized by b if b is a denominator (BY_B), else by the
    larger of the two. Computes in float64; AHEAD sums are prefetched while the previous ones are added.
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    lane_mask = channel < C
    group = program // blocks % groups
    image = program // blocks // groups  # [2, B]
    side = image // batch
    image = (image % batch).to(tl.int64)
    stride = batch.to(tl.int64) * count * C
    group_stride = batch.to(tl.int64) * groups * C
    group_state = (image * groups + group) * C + channel
    fade, factor = scans.fade_over(decay, channel, lane_mask, steps, num_tokens)

    E = tl.full(channel.shape, scans.EMPTY, tl.int32)
    a = tl.full(channel.shape, 0.0, tl.float64)
    b = tl.full(channel.shape, 0.0, tl.float64)
    if CARRY:
        E, a, b = scans.load_state(carry, group_state, side, group_stride, lane_mask)
        a = a.to(tl.float64)
        b = b.to(tl.float64)
    first = group * group_length
    length = tl.minimum(count - first, group_length)
    start = (image * count + tl.where(side == 0, first, first + length - 1)) * C + channel
    hop = tl.where(side == 0, C, -C)
    ahead = tl.arange(0, AHEAD)[:, None]
    places = tl.multiple_of(start[None, :] + ahead * hop, (1, 1))  # as in scans.locate
    mask = lane_mask[None, :] & (ahead < length)
    n, a1, b1 = scans.load_state(sums, places, side, stride, mask)
    for i in range(0, length, AHEAD):
        next_places = tl.multiple_of(places + AHEAD * hop, (1, 1))
        next_mask = lane_mask[None, :] & (ahead < length - i - AHEAD)
        next_n, next_a1, next_b1 = scans.load_state(sums, next_places, side, stride, next_mask)
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
            top, next_a, next_b = _append(E, a, b, ns[j], a1s[j], b1s[j], fade, factor)
            if TOTALS:  # no decay after the group's last sum
                more = i + j < length
                top = tl.where(more, top, E)
                next_a = tl.where(more, next_a, a)
                next_b = tl.where(more, next_b, b)
            E = top
            a = next_a
            b = next_b
        # each sum moves a pair out of [1, 2) by at most a factor of two
        size = b
        if not BY_B:
            size = tl.maximum(tl.abs(a), tl.abs(b))
        E, a, b = scans.normalize(E, a, b, size)
        if not TOTALS:
            En = scans.tile_of(before_n, AHEAD, BLOCK, False)
            ea = scans.tile_of(before_a, AHEAD, BLOCK, False)
            eb = scans.tile_of(before_b, AHEAD, BLOCK, False)
            scans.store_state(out, places, side, stride, mask, En, ea, eb)
        places = next_places
        mask = next_mask
        n = next_n
        a1 = next_a1
        b1 = next_b1
    if TOTALS:
        scans.store_state(out, group_state, side, group_stride, lane_mask, E, a, b)


@triton.jit
def _terms(
    k, v, mask, left, right, own_n, own_m, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The terms of eq. 9 for every token: its weight (n, m), the states that enter it from the left and from the right,
    numerator and denominator at one exponent, and its own part of the latter (the last result).
    """
    n, m = scans.weights(k, mask, reference, MASKED, WIDE)
    x = m * v
    En, ex, ee = scans.rebase(right, reference, WIDE)
    Rn, rx, re, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, lam, count, L, BLOCK, True, WIDE)
    En, ex, ee = scans.rebase(left, reference, WIDE)
    An, ax, ae, _n, _x, _e = scans.scan(En, ex, ee, n, x, m, fade, lam, count, L, BLOCK, False, WIDE)
    own = own_m[None, :]
    top, num, den, weight = scans.total(An, ax, ae, Rn, rx, re, n + own_n, x * own, m * own, WIDE)
    return n, m, An, ax, ae, Rn, rx, re, top, num, den, weight


@triton.jit
def _outputs(
    k, v, out, tokens, mask, left, right, own_n, own_m, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, lam = scans.adapt_factor(fade, lam, WIDE)
    own_n, own_m = scans.adapt_factor(own_n, own_m, WIDE)
    _n, _m, _An, _ax, _ae, _Rn, _rx, _re, _top, num, den, _own = _terms(
        k, v, mask, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WIDE
    )  # fmt: skip
    scans.store_tile(out + tokens, num * scans.reciprocal(den), mask, MASKED)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def outputs(
    step, references, bonus, key, value, out, states, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Phase 3: eq. 9 for every token, from the states that enter its chunk."""
    channel, lane_mask, tokens, mask, state, count = scans.locate(chunks, num_tokens, C, L, BLOCK, True)
    stride = stride.to(tl.int64)
    k = scans.load_tile(key + tokens, mask, MASKED).to(tl.float32)
    v = scans.load_tile(value + tokens, mask, MASKED).to(tl.float32)
    reference, wide = scans.load_reference(references + state, lane_mask)
    fade, lam = scans.load_step(step, channel, lane_mask, C)
    own_n, own_m = scans.split(tl.load(bonus + channel, mask=lane_mask, other=0.0).to(tl.float32))
    left = scans.load_state(states, state, 0, stride, lane_mask)
    right = scans.load_state(states, state, 1, stride, lane_mask)
    wide = wide | scans.out_of_range(own_n, left, right, reference)
    if scans.any_lane(wide & lane_mask):
        k = scans.load_tile(key + tokens, mask, MASKED).to(tl.float32)  # loaded again, as in chunk_sums
        v = scans.load_tile(value + tokens, mask, MASKED).to(tl.float32)
        _outputs(
            k, v, out, tokens, mask, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, True
        )  # fmt: skip
    else:
        _outputs(
            k, v, out, tokens, mask, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, False
        )  # fmt: skip


@triton.jit
def _backward(
    k, v, g, grad_key, grad_value, partials, tokens, mask, left, right, back_left, back_right, back_states, state,
    stride, lane_mask, own_n, own_m, fade, lam, reference, count,
    L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WRITE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, lam = scans.adapt_factor(fade, lam, WIDE)
    own_n, own_m = scans.adapt_factor(own_n, own_m, WIDE)
    n, m, An, ax, ae, Rn, rx, re, top, num, den, weight = _terms(
        k, v, mask, left, right, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WIDE
    )  # fmt: skip
    # after the last token of the row the denominator may be 0
    scale = scans.reciprocal(scans.where_valid(mask, den, 1.0, MASKED))
    y = num * scale
    h = g * scale
    q = h * y
    hn = -top
    if WIDE:
        hn = scans.where_valid(mask, hn, scans.EMPTY, MASKED)

    En, eh, eq = scans.rebase(back_right, -reference, WIDE)
    Bn, bh, bq, Sn, sh, sq = scans.scan(En, eh, eq, hn, h, q, fade, lam, count, L, BLOCK, True, WIDE)
    if WRITE:
        # a pair of tokens counts once for each token in between, where one is in the left and one in the right state
        if WIDE:
            scale_of_pair = scans.where_valid(mask, scans.product_scale(An + fade, Bn, WIDE), 0.0, MASKED)
            ax = ax * scale_of_pair
            ae = ae * scale_of_pair
        gw = scans.sum_of_products(ax, bh, ae, bq, L, BLOCK, True)
    else:
        Sn, sh, sq = scans.normalize(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        scans.store_state(back_states, state, 1, stride, lane_mask, Sn, sh, sq)
    En, eh, eq = scans.rebase(back_left, -reference, WIDE)
    Fn, fh, fq, Sn, sh, sq = scans.scan(En, eh, eq, hn, h, q, fade, lam, count, L, BLOCK, False, WIDE)
    if not WRITE:
        Sn, sh, sq = scans.normalize(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        scans.store_state(back_states, state, 0, stride, lane_mask, Sn, sh, sq)

    if WRITE:
        # e^k H and e^k Q, as in portable.wkv_backward
        left = scans.product_scale(n, Fn, WIDE) * m
        right = scans.product_scale(n, Bn, WIDE) * m
        gv = left * fh + right * bh + weight * h
        gq = left * fq + right * bq + weight * q
        scans.store_tile(grad_value + tokens, gv, mask, MASKED)
        scans.store_tile(grad_key + tokens, v * gv - gq, mask, MASKED)
        gu = scans.sum_of_products(weight * h, v, weight, q, L, BLOCK, False)
        if WIDE:
            scale_of_pair = scans.where_valid(mask, scans.product_scale(Rn + fade, Fn, WIDE), 0.0, MASKED)
            rx = rx * scale_of_pair
            re = re * scale_of_pair
        gw = -lam * (gw + scans.sum_of_products(rx, fh, re, fq, L, BLOCK, False))
        tl.store(partials + state, gw, mask=lane_mask)
        tl.store(partials + stride + state, gu, mask=lane_mask)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def backward(
    step, references, bonus, key, value, grad, grad_key, grad_value, partials, states, back_states,
    chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """The backward's phases 1 and 3 (WRITE): a chunk's sums of (h, q); the gradients, gw and gu as one part per chunk.

    partials float32 [2, B, chunks, C]: each chunk's part of N gw and of gu.
    """
    channel, lane_mask, tokens, mask, state, count = scans.locate(chunks, num_tokens, C, L, BLOCK, not WRITE)
    stride = stride.to(tl.int64)
    k = scans.load_tile(key + tokens, mask, MASKED).to(tl.float32)
    v = scans.load_tile(value + tokens, mask, MASKED).to(tl.float32)
    g = scans.load_tile(grad + tokens, mask, MASKED).to(tl.float32)
    reference, wide = scans.load_reference(references + state, lane_mask)
    if WRITE:
        back_left = scans.load_state(back_states, state, 0, stride, lane_mask)
        back_right = scans.load_state(back_states, state, 1, stride, lane_mask)
    else:
        back_left = scans.empty_state(channel, True)
        back_right = scans.empty_state(channel, True)
    fade, lam = scans.load_step(step, channel, lane_mask, C)
    own_n, own_m = scans.split(tl.load(bonus + channel, mask=lane_mask, other=0.0).to(tl.float32))
    left = scans.load_state(states, state, 0, stride, lane_mask)
    right = scans.load_state(states, state, 1, stride, lane_mask)
    wide = wide | scans.out_of_range(own_n, left, right, reference)
    if scans.any_lane(wide & lane_mask):
        k = scans.load_tile(key + tokens, mask, MASKED).to(tl.float32)  # loaded again, as in chunk_sums
        v = scans.load_tile(value + tokens, mask, MASKED).to(tl.float32)
        g = scans.load_tile(grad + tokens, mask, MASKED).to(tl.float32)
        _backward(
            k, v, g, grad_key, grad_value, partials, tokens, mask, left, right, back_left, back_right, back_states,
            state, stride, lane_mask, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WRITE, True,
        )  # fmt: skip
    else:
        _backward(
            k, v, g, grad_key, grad_value, partials, tokens, mask, left, right, back_left, back_right, back_states,
            state, stride, lane_mask, own_n, own_m, fade, lam, reference, count, L, BLOCK, MASKED, WRITE, False,
        )  # fmt: skip


@triton.jit
def _sum_rows(first, count, lane_mask, C: tl.constexpr, AHEAD: tl.constexpr):
    """The sum of `count` rows of C values, one after the other in float64; AHEAD of them are loaded at once."""
    total = tl.full(lane_mask.shape, 0.0, tl.float64)
    for i in range(0, count, AHEAD):
        rows = ()
        for j in tl.static_range(AHEAD):
            # a tile: in the interpreter of Triton 3.9 numbers compare to a Python bool, which is no mask
            row = tl.full(lane_mask.shape, i + j, tl.int32)
            rows = rows + (tl.load(first + (i + j) * C, mask=lane_mask & (row < count), other=0.0),)
        for j in tl.static_range(AHEAD):
            total += rows[j].to(tl.float64)
    return total


@triton.jit(do_not_specialize=["chunks"])
def sum_partials(partials, out, chunks, C: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Sum the parts of one image's gw or gu, [chunks, C] float32, to one row of out, float64 [2 B, C]."""
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
    """Sum the images' rows of N gw and of gu, [2, B, C] float64, to gw and gu [C]."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(0) // blocks
    total = _sum_rows(images + which.to(tl.int64) * batch * C + channel, batch, channel < C, C, AHEAD)
    if which == 0:
        tl.store(grad_decay + channel, (total / num_tokens).to(grad_decay.dtype.element_ty), mask=channel < C)
    else:
        tl.store(grad_bonus + channel, total.to(grad_bonus.dtype.element_ty), mask=channel < C)
