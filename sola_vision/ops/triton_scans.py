# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `triton_kernels.py` are made of: numbers with exponents, scans over a tile, states.

A state is (n, a, b): the pair (a, b) times 2^n, so that no key, decay or bonus over- or underflows. Where a chunk's
exponents lie close together (always, in a trained network) one exponent serves the whole chunk ("narrow", else "wide");
each program looks at its own keys and takes its path by itself, so nothing waits for the host. What goes token by token
is taken out of the tile row by row. A lane holds its channel's whole column, so that nothing crosses between lanes.
"""

# a kernel is not Python: no unpacking, no types but constexpr, and tuples that grow
# mypy: ignore-errors
# ruff: noqa: RUF005

import os

import torch
import triton
import triton.language as tl

# the exponent of a state without tokens: below every real one, and far enough from int32's end to be added to another
EMPTY = tl.constexpr(-(2**29))
# in the place of a chunk's exponent
TOO_WIDE = tl.constexpr(2**29)
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


# whether a kernel may name instructions of NVIDIA's
PTX = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def reciprocal(x):
    """1 / x of a normal x, to a unit in the last place; a division would look for numbers that have no such inverse."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def power(n):
    """2^n in float32 for integers n <= 127; 0 below -126."""
    return ((tl.maximum(n, -127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power64(n):
    """2^n in float64 for integers n <= 1023; 0 below -1022."""
    return ((tl.maximum(n, -1023) + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def bounded(x, limit):
    """x within +-limit; by comparison, because minimum and maximum would drop a nan."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def mantissa(x, n):
    """e^x / 2^n in float32, exact to rounding although both may be large."""
    return tl.exp2((x - n * LN2_HIGH) * LOG2E - n * (LN2_LOW * LOG2E))


@triton.jit
def split(x):
    """e^x as 2^n m with m in [0.7, 1.42]: (n int32, m float32)."""
    x = bounded(x, KEY_LIMIT)
    n = tl.floor(x * LOG2E + 0.5)
    return n.to(tl.int32), mantissa(x, n)


@triton.jit
def fade_over(decay_ptr, channel, inside, steps, num_tokens):
    """lam^steps as 2^n m: (n int32, m float64). The only place that knows that w is divided by N."""
    w = tl.load(decay_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    per_step = bounded(bounded(w * LOG2E, ROW_LIMIT) / num_tokens, STEP_LIMIT)
    x = bounded(-per_step * steps, 2 * ROW_LIMIT)
    n = tl.floor(x + 0.5)
    return n.to(tl.int32), tl.exp2(x - n)


@triton.jit
def fade_of_step(decay_ptr, channel, inside, num_tokens):
    """lam as 2^n m in float32, whose rounding a chunk's few tokens repeat; scan_states, over many, has float64."""
    n, m = fade_over(decay_ptr, channel, inside, 1, num_tokens)
    return n, m.to(tl.float32)


@triton.jit
def load_step(step, channel, inside, C: tl.constexpr):
    """lam as chunk_sums has left it, [2, C]: float64 takes longer than the rest of a short chunk's beginning."""
    n = tl.load((step + channel).to(tl.pointer_type(tl.int32)), mask=inside, other=0)
    return n, tl.load(step + C + channel, mask=inside, other=0.0)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def plus(a, b):
    return a + b


@triton.constexpr_function
def levels(n):
    return n.bit_length() - 1


@triton.jit
def rows_of(tile, L: tl.constexpr, BLOCK: tl.constexpr):
    """The L rows of a tile [L, BLOCK], by halving: Triton cannot index registers."""
    parts = (tile,)
    for level in tl.static_range(levels(L)):
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
def fold(tile, combine: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's rows combined into one, in a fixed order: halves onto halves."""
    for level in tl.static_range(levels(L)):
        pair = tl.permute(tl.reshape(tile, (2, L // 2 ** (level + 1), BLOCK)), (1, 2, 0))
        first, second = tl.split(pair)
        tile = combine(first, second)
    return tl.reshape(tile, (BLOCK,))


@triton.jit
def sum_of_products(a, b, c, d, L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The sum over rows of a b - c d, one row after the other as a scan makes them, so that none has to be kept."""
    first = rows_of(a, L, BLOCK)
    second = rows_of(b, L, BLOCK)
    third = rows_of(c, L, BLOCK)
    fourth = rows_of(d, L, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for i in tl.static_range(L):
        total = tl.fma(first[L - 1 - i if REVERSE else i], second[L - 1 - i if REVERSE else i], total)
        total = tl.fma(-third[L - 1 - i if REVERSE else i], fourth[L - 1 - i if REVERSE else i], total)
    return total


@triton.jit
def tile_of(rows, L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """L rows, or from the last to the first, as a tile [L, BLOCK]."""
    parts = ()
    for i in tl.static_range(L):
        parts = parts + (tl.reshape(rows[L - 1 - i if REVERSE else i], (1, BLOCK)),)
    for level in tl.static_range(levels(L)):
        doubles = ()
        for i in tl.static_range(L // 2 ** (level + 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (2, 0, 1))
            doubles = doubles + (tl.reshape(pair, (2 ** (level + 1), BLOCK)),)
        parts = doubles
    return parts[0]


@triton.jit
def place(chunks, num_tokens, C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, FROM_LAST: tl.constexpr):
    """Which chunk and channels this program owns. One grid axis: only the first may pass 65535. Phases go through the
    chunks in turn from the first and from the last, so that they begin with what the cache still has.

    Returns the channels and which of them exist, the offsets of the chunk's tokens and which of them exist (tiles), the
    offset of the chunk's state, and how many tokens there are.
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if FROM_LAST:
        program = tl.num_programs(0) - 1 - program
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    index = program // blocks  # [B, chunks]
    start = (index % chunks) * L
    token = tl.arange(0, L)[:, None]
    # channel and place of the first token, then as many channels more as are known when this is compiled
    tokens = ((index // chunks).to(tl.int64) * num_tokens + start) * C + channel[None, :] + token * C
    # a lane would else take neighbouring channels, and the tile would have to be turned for the scan
    tokens = tl.multiple_of(tokens, (1, 1))
    there = (token < num_tokens - start) & (channel < C)[None, :]
    return channel, channel < C, tokens, there, index.to(tl.int64) * C + channel, tl.minimum(num_tokens - start, L)


@triton.jit
def load_tile(pointers, there, MASKED: tl.constexpr):
    """A tile as it is in memory, 0 where it is not there: to be converted where it is needed."""
    if MASKED:
        return tl.load(pointers, mask=there, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointers, tile, there, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=there)
    else:
        tl.store(pointers, tile.to(pointers.dtype.element_ty))


@triton.jit
def where_there(there, tile, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.where(there, tile, other)
    else:
        return tile


@triton.jit
def survey(k, there, fade, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The chunk's reference exponent a channel (its largest key's), and where the span is too wide for one exponent."""
    high = fold(where_there(there, k, -float("inf"), MASKED), larger, L, BLOCK)
    low = fold(where_there(there, k, float("inf"), MASKED), smaller, L, BLOCK)
    reference = tl.floor(bounded(high, KEY_LIMIT) * LOG2E + 0.5).to(tl.int32)
    # what fades may vanish; what grows with the distance has no bound but 2^(L/2) over a chunk without an exponent
    return reference, ((high - low) * LOG2E > NARROW) | (tl.abs(high) > KEY_LIMIT) | (fade > 0)


@triton.jit
def store_reference(pointers, reference, wide, inside):
    tl.store(pointers.to(tl.pointer_type(tl.int32)), tl.where(wide, TOO_WIDE, reference), mask=inside)


@triton.jit
def load_reference(pointers, inside):
    """A chunk's reference exponent and where it was too wide for one, as `survey` has found."""
    reference = exponent(pointers, inside)
    return reference, reference == TOO_WIDE


@triton.jit
def far(own_n, left, right, reference):
    """Where bonus or an entering state is too far from the chunk's reference for the narrow path."""
    return (tl.abs(own_n).to(tl.float32) > NARROW) | (tl.maximum(left[0], right[0]) - reference > NARROW_STATE)


@triton.jit
def any_lane(lanes):
    return tl.reduce(lanes.to(tl.int32), 0, either) != 0


@triton.jit
def weights(k, there, reference, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """e^k of every token as 2^n m: n the chunk's where narrow (a row), the token's own where wide (a tile)."""
    if WIDE:
        n, m = split(k)
        return where_there(there, n, EMPTY, MASKED), where_there(there, m, 0.0, MASKED)
    else:
        return reference, where_there(there, mantissa(k, reference.to(tl.float32)[None, :]), 0.0, MASKED)


@triton.jit
def scan(
    E, a, b, n, a1, b1, fade, lam, count,
    L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The scan itself, token by token from the state (a, b) 2^E: state <- lam state + (a1, b1) 2^n.

    Returns the states before every token (tiles; one row of exponents where narrow) and the one behind the last token.
    """
    if WIDE:
        return _wide_scan(E, a, b, n, a1, b1, fade, lam, count, L, BLOCK, REVERSE)
    else:
        a1s = rows_of(a1, L, BLOCK)
        b1s = rows_of(b1, L, BLOCK)
        before_a = ()
        before_b = ()
        for i in tl.static_range(L):
            before_a = before_a + (a,)
            before_b = before_b + (b,)
            a = a * lam + a1s[L - 1 - i if REVERSE else i]
            b = b * lam + b1s[L - 1 - i if REVERSE else i]
        return n, tile_of(before_a, L, BLOCK, REVERSE), tile_of(before_b, L, BLOCK, REVERSE), E, a, b


@triton.jit
def _wide_scan(
    E, a, b, n, a1, b1, fade, lam, count, L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The first `count` rows in a loop, since wide chunks are rare: rows are taken out of tiles and put in by index."""
    rows = tl.arange(0, L)[:, None]
    before_n = tl.full((L, BLOCK), EMPTY, tl.int32)
    before_a = tl.full((L, BLOCK), 0.0, tl.float32)
    before_b = tl.full((L, BLOCK), 0.0, tl.float32)
    for i in range(count):
        here = rows == (count - 1 - i if REVERSE else i)
        before_n = tl.where(here, E[None, :], before_n)
        before_a = tl.where(here, a[None, :], before_a)
        before_b = tl.where(here, b[None, :], before_b)
        E = tl.maximum(E + fade, EMPTY)
        own = fold(tl.where(here, n, 0), plus, L, BLOCK)
        top = tl.maximum(E, own)
        old = lam * power(E - top)
        new = power(own - top)
        E = top
        a = a * old + fold(tl.where(here, a1, 0.0), plus, L, BLOCK) * new
        b = b * old + fold(tl.where(here, b1, 0.0), plus, L, BLOCK) * new
    return before_n, before_a, before_b, E, a, b


@triton.jit
def normal(E, a, b, size):
    """The same state with size, a bound of a and b, in [1, 2). In the pair's precision."""
    raised = (size.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    shift = tl.minimum(raised - 127, 126)
    scale = power(-shift).to(size.dtype)
    return tl.where(raised == 0, EMPTY, E + shift), a * scale, b * scale


@triton.jit
def exponent(pointers, inside):
    empty: tl.constexpr = EMPTY
    return tl.load(pointers.to(tl.pointer_type(tl.int32)), mask=inside, other=empty)


@triton.jit
def load_state(states, state, side, stride, inside):
    """The state that enters a chunk from one side: (exponent, a, b)."""
    E = exponent(states + side * stride + state, inside)
    a = tl.load(states + (2 + side) * stride + state, mask=inside, other=0.0)
    b = tl.load(states + (4 + side) * stride + state, mask=inside, other=0.0)
    return E, a, b


@triton.jit
def store_state(states, state, side, stride, inside, E, a, b):
    tl.store((states + side * stride + state).to(tl.pointer_type(tl.int32)), E, mask=inside)
    tl.store(states + (2 + side) * stride + state, a.to(tl.float32), mask=inside)
    tl.store(states + (4 + side) * stride + state, b.to(tl.float32), mask=inside)


@triton.jit
def enter(state, reference, WIDE: tl.constexpr):
    """An entering state in the chunk's terms: as it is where wide, at the chunk's exponent where narrow."""
    E, a, b = state
    if WIDE:
        return E, a, b
    else:
        scale = power(tl.minimum(E - reference, 127))
        return reference, a * scale, b * scale


@triton.jit
def nothing(reference, WIDE: tl.constexpr):
    """A state without tokens."""
    zero = tl.full(reference.shape, 0.0, tl.float32)
    if WIDE:
        return tl.full(reference.shape, EMPTY, tl.int32), zero, zero
    else:
        return reference, zero, zero


@triton.jit
def whole(n, m, WIDE: tl.constexpr):
    """A factor 2^n m with the exponent beside it where wide, inside it where narrow."""
    if WIDE:
        return n, m
    else:
        return n * 0, m * power(tl.minimum(n, 127))


@triton.jit
def meeting(n, E, WIDE: tl.constexpr):
    """2^(n + E) of a forward and a backward state (or token), whose product is a plain number: at most about 1."""
    if WIDE:
        return power(tl.minimum(n + E, 127))
    else:
        return 1.0


@triton.jit
def total(An, ax, ae, Rn, rx, re, own_n, x, e, WIDE: tl.constexpr):
    """Left state, right state and the token itself as one: (exponent, numerator, denominator, the token's own part)."""
    if WIDE:
        top = tl.maximum(tl.maximum(An, Rn), own_n)
        left = power(An - top)
        right = power(Rn - top)
        own = power(own_n - top)
        return top, ax * left + rx * right + x * own, ae * left + re * right + e * own, e * own
    else:
        return An, ax + rx + x, ae + re + e, e
