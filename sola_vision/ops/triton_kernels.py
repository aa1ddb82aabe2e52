# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of Bi-WKV: forward and backward in three phases over chunks of L tokens. `gpu.py` launches them.

With lam = e^(-w/N) and s_i = e^(k_i) (v_i, 1), eq. 9 is the first sum over the second of A + R + e^u s_t, where A and R
are exclusive scans, A_(t+1) = lam A_t + s_t and R_(t-1) = lam R_t + s_t. (1) Every chunk sums its tokens as its
neighbours see them, (2) a small scan over chunks turns sums into the states that enter each chunk, (3) every chunk
scans its tokens and writes. The backward does the same with (h, q) = (g, g y) / D, D the denominator, since the mixing
matrix is symmetric.

A state is (n, a, b): the pair (a, b) times 2^n, so that no key, decay or bonus over- or underflows. Where a chunk's
exponents lie close together (always, in a trained network) one exponent serves the whole chunk ("narrow", else "wide");
each program looks at its own keys and takes its path by itself, so nothing waits for the host.

B batch, N tokens, C channels; a program owns a tile [L, BLOCK] of one image, a lane one channel, and every reading is
coalesced along channels. What goes token by token is taken out of the tile row by row, all in registers. Sums and
states: exponents int32 [2, B, chunks, C], pairs float32 [2, 2, B, chunks, C], first index left or right, second a or b.
"""

# a kernel is not Python: no unpacking, no types but constexpr, and tuples that grow
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108

import triton
import triton.language as tl

# the exponent of a state without tokens: below every real one, and far enough from int32's end to be added to another
EMPTY = tl.constexpr(-(2**29))
# beyond these a token's weight is all or nothing: 2^22 for a key or bonus, 2^23 for a step, 2^27 for the whole row
KEY_LIMIT = tl.constexpr(2.9e6)
STEP_LIMIT = tl.constexpr(2.0**23)
ROW_LIMIT = tl.constexpr(2.0**27)
# what "close together" means, in powers of two: far from float32's range and small enough to round well
NARROW = tl.constexpr(24.0)
# how far an entering state may stand above the chunk's own tokens
NARROW_STATE = tl.constexpr(48)

LOG2E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: a product of the first with an exponent below 2^15 is exact
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def _power(n):
    """2^n in float32 for integers n <= 127; 0 below -126."""
    return ((tl.maximum(n, -127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _bounded(x, limit):
    """x within +-limit; by comparison, because minimum and maximum would drop a nan."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _mantissa(x, n):
    """e^x / 2^n in float32, exact to rounding although both may be large."""
    return tl.exp2(((x - n * LN2_HIGH) - n * LN2_LOW) * LOG2E)


@triton.jit
def _split(x):
    """e^x as 2^n m with m in [0.7, 1.42]: (n int32, m float32)."""
    x = _bounded(x, KEY_LIMIT)
    n = tl.floor(x * LOG2E + 0.5)
    return n.to(tl.int32), _mantissa(x, n)


@triton.jit
def _fade(decay_ptr, channel, inside, steps, num_tokens):
    """lam^steps as 2^n m: (n int32, m float64). The only place that knows that w is divided by N."""
    w = tl.load(decay_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    per_step = _bounded(_bounded(w * LOG2E, ROW_LIMIT) / num_tokens, STEP_LIMIT)
    x = _bounded(-per_step * steps, 2 * ROW_LIMIT)
    n = tl.floor(x + 0.5)
    return n.to(tl.int32), tl.exp2(x - n)


@triton.jit
def _step_fade(decay_ptr, channel, inside, num_tokens):
    """lam as 2^n (high + low), two floats: one would be wrong in the same direction at every step."""
    n, m = _fade(decay_ptr, channel, inside, 1, num_tokens)
    high = m.to(tl.float32)
    return n, high, (m - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _plus(a, b):
    return a + b


@triton.constexpr_function
def _levels(n):
    return n.bit_length() - 1


@triton.jit
def _rows(tile, L: tl.constexpr, BLOCK: tl.constexpr):
    """The L rows of a tile [L, BLOCK], by halving: Triton cannot index registers."""
    parts = (tile,)
    for level in tl.static_range(_levels(L)):
        halves = ()
        for i in tl.static_range(2**level):
            pair = tl.permute(tl.reshape(parts[i], (2, L // 2 ** (level + 1), BLOCK)), (1, 2, 0))
            first, second = tl.split(pair)
            halves = halves + (first, second)
        parts = halves
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (tl.reshape(parts[i], (BLOCK,)),)
    return rows


@triton.jit
def _fold(tile, combine: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's rows combined into one, in a fixed order: halves onto halves."""
    for level in tl.static_range(_levels(L)):
        pair = tl.permute(tl.reshape(tile, (2, L // 2 ** (level + 1), BLOCK)), (1, 2, 0))
        first, second = tl.split(pair)
        tile = combine(first, second)
    return tl.reshape(tile, (BLOCK,))


@triton.jit
def _tile(rows, L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """L rows, or from the last to the first, as a tile [L, BLOCK]."""
    parts = ()
    for i in tl.static_range(L):
        parts = parts + (tl.reshape(rows[L - 1 - i if REVERSE else i], (1, BLOCK)),)
    for level in tl.static_range(_levels(L)):
        doubles = ()
        for i in tl.static_range(L // 2 ** (level + 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (2, 0, 1))
            doubles = doubles + (tl.reshape(pair, (2 ** (level + 1), BLOCK)),)
        parts = doubles
    return parts[0]


@triton.jit
def _place(chunks, num_tokens, C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """Which chunk and channels this program owns. One grid axis: only the first may pass 65535.

    Returns the channels and which of them exist, the offsets of the chunk's tokens and which of them exist (tiles), and
    the offset of the chunk's state.
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    index = program // blocks  # [B, chunks]
    start = (index % chunks) * L
    token = tl.arange(0, L)[:, None]
    tokens = ((index // chunks).to(tl.int64) * num_tokens + start) * C + (token * C + channel[None, :])
    there = (token < num_tokens - start) & (channel < C)[None, :]
    return channel, channel < C, tokens, there, index.to(tl.int64) * C + channel


@triton.jit
def _survey(k, there, fade, L: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk's reference exponent a channel (its largest key's), and where the span is too wide for one exponent."""
    high = _fold(tl.where(there, k, -float("inf")), _larger, L, BLOCK)
    low = _fold(tl.where(there, k, float("inf")), _smaller, L, BLOCK)
    reference = tl.floor(_bounded(high, KEY_LIMIT) * LOG2E + 0.5).to(tl.int32)
    # without an exponent of its own a step fades by 0.7 .. 1.4, a chunk by 2^(L/2) at most
    return reference, ((high - low) * LOG2E > NARROW) | (fade != 0)


@triton.jit
def _far(own_n, exponents, state, stride, inside, reference):
    """Where bonus or an entering state is too far from the chunk's reference for the narrow path."""
    left = tl.load(exponents + state, mask=inside, other=EMPTY)
    right = tl.load(exponents + stride + state, mask=inside, other=EMPTY)
    return (tl.abs(own_n).to(tl.float32) > NARROW) | (tl.maximum(left, right) - reference > NARROW_STATE)


@triton.jit
def _any(lanes):
    return tl.reduce(lanes.to(tl.int32), 0, _either) != 0


@triton.jit
def _weights(k, there, reference, WIDE: tl.constexpr):
    """e^k of every token as 2^n m: n the chunk's where narrow (a row), the token's own where wide (a tile)."""
    if WIDE:
        n, m = _split(k)
        return tl.where(there, n, EMPTY), tl.where(there, m, 0.0)
    else:
        return reference, tl.where(there, _mantissa(k, reference.to(tl.float32)[None, :]), 0.0)


@triton.jit
def _scan(
    E, a, b, n, a1, b1, fade, high, low,
    L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The scan itself, token by token from the state (a, b) 2^E: state <- lam state + (a1, b1) 2^n.

    Returns the states before every token (tiles; one row of exponents where narrow) and the one behind the last token.
    """
    ns = n
    if WIDE:
        ns = _rows(n, L, BLOCK)
    a1s = _rows(a1, L, BLOCK)
    b1s = _rows(b1, L, BLOCK)
    before_n = ()
    before_a = ()
    before_b = ()
    for i in tl.static_range(L):
        before_a = before_a + (a,)
        before_b = before_b + (b,)
        if WIDE:
            before_n = before_n + (E,)
            E = tl.maximum(E + fade, EMPTY)
            top = tl.maximum(E, ns[L - 1 - i if REVERSE else i])
            old = _power(E - top)
            new = _power(ns[L - 1 - i if REVERSE else i] - top)
            E = top
            a = a * (high * old) + (a * (low * old) + a1s[L - 1 - i if REVERSE else i] * new)
            b = b * (high * old) + (b * (low * old) + b1s[L - 1 - i if REVERSE else i] * new)
        else:
            a = a * high + (a * low + a1s[L - 1 - i if REVERSE else i])
            b = b * high + (b * low + b1s[L - 1 - i if REVERSE else i])
    exponents = n
    if WIDE:
        exponents = _tile(before_n, L, BLOCK, REVERSE)
    return exponents, _tile(before_a, L, BLOCK, REVERSE), _tile(before_b, L, BLOCK, REVERSE), E, a, b


@triton.jit
def _normal(E, a, b, size):
    """The same state with size, a bound of a and b, in [1, 2). In the pair's precision."""
    raised = (size.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    shift = tl.minimum(raised - 127, 126)
    scale = _power(-shift).to(size.dtype)
    return tl.where(raised == 0, EMPTY, E + shift), a * scale, b * scale


@triton.jit
def _load_state(exponents, pairs, state, side, stride, inside):
    """The state that enters a chunk from one side: (exponent, a, b)."""
    E = tl.load(exponents + side * stride + state, mask=inside, other=EMPTY)
    a = tl.load(pairs + 2 * side * stride + state, mask=inside, other=0.0)
    b = tl.load(pairs + (2 * side + 1) * stride + state, mask=inside, other=0.0)
    return E, a, b


@triton.jit
def _store_state(exponents, pairs, state, side, stride, inside, E, a, b):
    tl.store(exponents + side * stride + state, E, mask=inside)
    tl.store(pairs + 2 * side * stride + state, a.to(tl.float32), mask=inside)
    tl.store(pairs + (2 * side + 1) * stride + state, b.to(tl.float32), mask=inside)


@triton.jit
def _enter(exponents, pairs, state, side, stride, inside, reference, WIDE: tl.constexpr):
    """An entering state in the chunk's terms: as it is where wide, at the chunk's exponent where narrow."""
    E, a, b = _load_state(exponents, pairs, state, side, stride, inside)
    if WIDE:
        return E, a, b
    else:
        scale = _power(tl.minimum(E - reference, 127))
        return reference, a * scale, b * scale


@triton.jit
def _nothing(reference, WIDE: tl.constexpr):
    """A state without tokens."""
    zero = tl.full(reference.shape, 0.0, tl.float32)
    if WIDE:
        return tl.full(reference.shape, EMPTY, tl.int32), zero, zero
    else:
        return reference, zero, zero


@triton.jit
def _whole(n, high, low, WIDE: tl.constexpr):
    """A factor 2^n (high + low) with the exponent beside it where wide, inside it where narrow."""
    if WIDE:
        return n, high, low
    else:
        scale = _power(tl.minimum(n, 127))
        return n * 0, high * scale, low * scale


@triton.jit
def _meeting(n, E, WIDE: tl.constexpr):
    """2^(n + E) of a forward and a backward state (or token), whose product is a plain number: at most about 1."""
    if WIDE:
        return _power(tl.minimum(n + E, 127))
    else:
        return 1.0


@triton.jit
def _total(An, ax, ae, Rn, rx, re, own_n, x, e, WIDE: tl.constexpr):
    """Left state, right state and the token itself as one: (exponent, numerator, denominator, the token's own part)."""
    if WIDE:
        top = tl.maximum(tl.maximum(An, Rn), own_n)
        left = _power(An - top)
        right = _power(Rn - top)
        own = _power(own_n - top)
        return top, ax * left + rx * right + x * own, ae * left + re * right + e * own, e * own
    else:
        return An, ax + rx + x, ae + re + e, e


@triton.jit
def _chunk_sums(
    k, value, tokens, there, exponents, pairs, state, stride, inside, fade, high, low, reference,
    L: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, high, low = _whole(fade, high, low, WIDE)
    n, m = _weights(k, there, reference, WIDE)
    x = m * tl.load(value + tokens, mask=there, other=0.0).to(tl.float32)
    E, a, b = _nothing(reference, WIDE)
    _n, _x, _e, En, ex, ee = _scan(E, a, b, n, x, m, fade, high, low, L, BLOCK, False, WIDE)
    En, ex, ee = _normal(En, ex, ee, ee)
    _store_state(exponents, pairs, state, 0, stride, inside, En, ex, ee)
    _n, _x, _e, En, ex, ee = _scan(E, a, b, n, x, m, fade, high, low, L, BLOCK, True, WIDE)
    En, ex, ee = _normal(En, ex, ee, ee)
    _store_state(exponents, pairs, state, 1, stride, inside, En, ex, ee)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def chunk_sums(
    decay, key, value, exponents, pairs, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 1: each chunk's tokens as the first token after it (left) and the last before it (right) see them."""
    channel, inside, tokens, there, state = _place(chunks, num_tokens, C, L, BLOCK)
    stride = stride.to(tl.int64)
    fade, high, low = _step_fade(decay, channel, inside, num_tokens)
    k = tl.load(key + tokens, mask=there, other=0.0).to(tl.float32)
    reference, wide = _survey(k, there, fade, L, BLOCK)
    if _any(wide & inside):
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
    fade, factor = _fade(decay, channel, inside, steps, num_tokens)

    E = tl.full(channel.shape, EMPTY, tl.int32)
    a = tl.full(channel.shape, 0.0, tl.float64)
    b = tl.full(channel.shape, 0.0, tl.float64)
    if CARRY:
        E, a, b = _load_state(carry_exponents, carry_pairs, group_state, side, group_stride, inside)
        a = a.to(tl.float64)
        b = b.to(tl.float64)
    first = group * group_length
    length = tl.minimum(count - first, group_length)
    for i in range(0, length):
        index = first + tl.where(side == 0, i, length - 1 - i)
        state = (image * count + index) * C + channel
        n, a1, b1 = _load_state(in_exponents, in_pairs, state, side, stride, inside)
        if not TOTALS:
            _store_state(out_exponents, out_pairs, state, side, stride, inside, E, a, b)
        E = tl.maximum(E + fade, EMPTY)
        top = tl.maximum(E, n)
        old = _power(E - top).to(tl.float64) * factor
        new = _power(n - top).to(tl.float64)
        a = a * old + a1.to(tl.float64) * new
        b = b * old + b1.to(tl.float64) * new
        if BY_B:
            size = b
        else:
            size = tl.maximum(tl.abs(a), tl.abs(b))
        E, a, b = _normal(top, a, b, size)
    if TOTALS:
        _store_state(out_exponents, out_pairs, group_state, side, group_stride, inside, E, a, b)


@triton.jit
def _outputs(
    k, value, out, tokens, there, exponents, pairs, state, stride, inside, own_n, own_m, fade, high, low, reference,
    L: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    fade, high, low = _whole(fade, high, low, WIDE)
    own_n, own_m, _ = _whole(own_n, own_m, own_m, WIDE)
    n, m = _weights(k, there, reference, WIDE)
    x = m * tl.load(value + tokens, mask=there, other=0.0).to(tl.float32)
    En, ex, ee = _enter(exponents, pairs, state, 1, stride, inside, reference, WIDE)
    Rn, rx, re, _n, _x, _e = _scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, True, WIDE)
    En, ex, ee = _enter(exponents, pairs, state, 0, stride, inside, reference, WIDE)
    An, ax, ae, _n, _x, _e = _scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, False, WIDE)
    own = own_m[None, :]
    _n, num, den, _e = _total(An, ax, ae, Rn, rx, re, n + own_n, x * own, m * own, WIDE)
    tl.store(out + tokens, (num / den).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["chunks", "num_tokens", "stride"])
def outputs(
    decay, bonus, key, value, out, exponents, pairs, chunks, num_tokens, stride,
    C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 3: every token's eq. 9, from the states that enter its chunk."""
    channel, inside, tokens, there, state = _place(chunks, num_tokens, C, L, BLOCK)
    stride = stride.to(tl.int64)
    fade, high, low = _step_fade(decay, channel, inside, num_tokens)
    own_n, own_m = _split(tl.load(bonus + channel, mask=inside, other=0.0).to(tl.float32))
    k = tl.load(key + tokens, mask=there, other=0.0).to(tl.float32)
    reference, wide = _survey(k, there, fade, L, BLOCK)
    wide = wide | _far(own_n, exponents, state, stride, inside, reference)
    if _any(wide & inside):
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
    fade, high, low = _whole(fade, high, low, WIDE)
    own_n, own_m, _ = _whole(own_n, own_m, own_m, WIDE)
    n, m = _weights(k, there, reference, WIDE)
    v = tl.load(value + tokens, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + tokens, mask=there, other=0.0).to(tl.float32)
    x = m * v
    En, ex, ee = _enter(exponents, pairs, state, 1, stride, inside, reference, WIDE)
    Rn, rx, re, _n, _x, _e = _scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, True, WIDE)
    En, ex, ee = _enter(exponents, pairs, state, 0, stride, inside, reference, WIDE)
    An, ax, ae, _n, _x, _e = _scan(En, ex, ee, n, x, m, fade, high, low, L, BLOCK, False, WIDE)
    own = own_m[None, :]
    top, num, den, weight = _total(An, ax, ae, Rn, rx, re, n + own_n, x * own, m * own, WIDE)
    # behind the row's end there may be no denominator at all
    scale = 1.0 / tl.where(there, den, 1.0)
    y = num * scale
    h = g * scale
    q = h * y
    hn = -top
    if WIDE:
        hn = tl.where(there, hn, EMPTY)

    if WRITE:
        En, eh, eq = _enter(back_exponents, back_pairs, state, 0, stride, inside, -reference, WIDE)
    else:
        En, eh, eq = _nothing(-reference, WIDE)
    Fn, fh, fq, Sn, sh, sq = _scan(En, eh, eq, hn, h, q, fade, high, low, L, BLOCK, False, WIDE)
    if not WRITE:
        Sn, sh, sq = _normal(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        _store_state(back_exponents, back_pairs, state, 0, stride, inside, Sn, sh, sq)
    if WRITE:
        En, eh, eq = _enter(back_exponents, back_pairs, state, 1, stride, inside, -reference, WIDE)
    else:
        En, eh, eq = _nothing(-reference, WIDE)
    Bn, bh, bq, Sn, sh, sq = _scan(En, eh, eq, hn, h, q, fade, high, low, L, BLOCK, True, WIDE)
    if not WRITE:
        Sn, sh, sq = _normal(Sn, sh, sq, tl.maximum(tl.abs(sh), tl.abs(sq)))
        _store_state(back_exponents, back_pairs, state, 1, stride, inside, Sn, sh, sq)

    if WRITE:
        # H and Q of the docstring's symmetric matrix, times e^k
        left = _meeting(n, Fn, WIDE) * m
        right = _meeting(n, Bn, WIDE) * m
        gv = left * fh + right * bh + weight * h
        gq = left * fq + right * bq + weight * q
        tl.store(grad_value + tokens, gv.to(grad_value.dtype.element_ty), mask=there)
        tl.store(grad_key + tokens, (v * gv - gq).to(grad_key.dtype.element_ty), mask=there)
        gu = _fold(weight * h * (v - y), _plus, L, BLOCK)
        # every token between two others sees the left state of one and the right state of the other
        between = _meeting(An + fade, Bn, WIDE) * (ax * bh - ae * bq)
        between += _meeting(Rn + fade, Fn, WIDE) * (rx * fh - re * fq)
        gw = -high * _fold(tl.where(there, between, 0.0), _plus, L, BLOCK)
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
    channel, inside, tokens, there, state = _place(chunks, num_tokens, C, L, BLOCK)
    stride = stride.to(tl.int64)
    fade, high, low = _step_fade(decay, channel, inside, num_tokens)
    own_n, own_m = _split(tl.load(bonus + channel, mask=inside, other=0.0).to(tl.float32))
    k = tl.load(key + tokens, mask=there, other=0.0).to(tl.float32)
    reference, wide = _survey(k, there, fade, L, BLOCK)
    wide = wide | _far(own_n, exponents, state, stride, inside, reference)
    if _any(wide & inside):
        _backward(
            k, value, grad, grad_key, grad_value, partials, tokens, there, exponents, pairs, back_exponents, back_pairs,
            state, stride, inside, own_n, own_m, fade, high, low, reference, L, BLOCK, WRITE, True,
        )  # fmt: skip
    else:
        _backward(
            k, value, grad, grad_key, grad_value, partials, tokens, there, exponents, pairs, back_exponents, back_pairs,
            state, stride, inside, own_n, own_m, fade, high, low, reference, L, BLOCK, WRITE, False,
        )  # fmt: skip
