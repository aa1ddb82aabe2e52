# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the kernels in `triton_kernels.py`: numbers with exponents, scans over a tile, states.

A state is (n, a, b): the pair (a, b) times 2^n, so that no key, decay or bonus over- or underflows. If a chunk's
exponents are close together (always, in a trained network) the whole chunk shares one exponent ("narrow", else "wide");
each program chooses the path from its own keys, without the host. Scans process the rows of a tile one after the other.
A lane holds the whole column of its channel, so that no data moves between lanes.
"""

# a kernel is not Python: no unpacking, no types but constexpr, and tuples that grow
# mypy: ignore-errors
# ruff: noqa: RUF005

import os

import torch
import triton
import triton.language as tl

# exponent of an empty state: below any other, and far enough from the limit of int32 that two of them can be added
EMPTY = tl.constexpr(-(2**29))
# stored instead of a chunk's exponent if the chunk is wide
TOO_WIDE = tl.constexpr(2**29)
# above these limits a weight is zero or dominates: 2^22 for a key or bonus, 2^23 for a step, 2^27 for the whole row
KEY_LIMIT = tl.constexpr(2.9e6)
STEP_LIMIT = tl.constexpr(2.0**23)
ROW_LIMIT = tl.constexpr(2.0**27)
# the largest span of a narrow chunk in powers of two: far from the range of float32, with small rounding errors
NARROW = tl.constexpr(24.0)
# the largest exponent of an entering state relative to the chunk's, on the narrow path
NARROW_STATE = tl.constexpr(48)

LOG2E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: a product of the first with an exponent below 2^15 is exact
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)


# True if kernels may contain inline PTX
PTX = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def reciprocal(x):
    """1 / x for normal x, to one unit in the last place; a division would also handle denormals and overflow."""
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
    """Clamp x to +-limit; by comparison, because minimum and maximum would drop a NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def mantissa(x, n):
    """e^x / 2^n in float32, accurate to rounding even if both are large."""
    return tl.exp2((x - n * LN2_HIGH) * LOG2E - n * (LN2_LOW * LOG2E))


@triton.jit
def split(x):
    """e^x as 2^n m with m in [0.7, 1.42]: (n int32, m float32)."""
    x = bounded(x, KEY_LIMIT)
    n = tl.floor(x * LOG2E + 0.5)
    return n.to(tl.int32), mantissa(x, n)


@triton.jit
def fade_over(decay_ptr, channel, lane_mask, steps, num_tokens):
    """lam^steps as 2^n m: (n int32, m float64). Only here is w divided by N."""
    w = tl.load(decay_ptr + channel, mask=lane_mask, other=0.0).to(tl.float64)
    per_step = bounded(bounded(w * LOG2E, ROW_LIMIT) / num_tokens, STEP_LIMIT)
    x = bounded(-per_step * steps, 2 * ROW_LIMIT)
    n = tl.floor(x + 0.5)
    return n.to(tl.int32), tl.exp2(x - n)


@triton.jit
def fade_of_step(decay_ptr, channel, lane_mask, num_tokens):
    """lam as 2^n m in float32: over a chunk's few tokens its rounding is harmless; scan_states uses float64."""
    n, m = fade_over(decay_ptr, channel, lane_mask, 1, num_tokens)
    return n, m.to(tl.float32)


@triton.jit
def load_step(step, channel, lane_mask, C: tl.constexpr):
    """Load lam as stored by chunk_sums, [2, C]: recomputing it in float64 would dominate the start of a short chunk."""
    n = tl.load((step + channel).to(tl.pointer_type(tl.int32)), mask=lane_mask, other=0)
    return n, tl.load(step + C + channel, mask=lane_mask, other=0.0)


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
    """Split a tile [L, BLOCK] into its L rows by halving, because Triton cannot index registers."""
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
    """Reduce a tile's rows to one in a fixed order, by combining halves."""
    for level in tl.static_range(levels(L)):
        pair = tl.permute(tl.reshape(tile, (2, L // 2 ** (level + 1), BLOCK)), (1, 2, 0))
        first, second = tl.split(pair)
        tile = combine(first, second)
    return tl.reshape(tile, (BLOCK,))


@triton.jit
def sum_of_products(a, b, c, d, L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The sum over rows of a b - c d, row by row in the order of a scan, so that no row stays in registers."""
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
    """Join L rows, in reversed order if REVERSE, to a tile [L, BLOCK]."""
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
def locate(chunks, num_tokens, C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, FROM_LAST: tl.constexpr):
    """The chunk and channels of this program. The grid has one axis, since only the first may exceed 65535. Consecutive
    phases traverse the chunks in opposite directions, so that each starts with data that is still in the cache.

    Returns the channels and their mask, the offsets of the chunk's tokens and their mask (tiles), the offset of the
    chunk's state, and the number of tokens.
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if FROM_LAST:
        program = tl.num_programs(0) - 1 - program
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    index = program // blocks  # [B, chunks]
    start = (index % chunks) * L
    token = tl.arange(0, L)[:, None]
    # the offset of the first token, plus row offsets that are compile-time constants
    tokens = ((index // chunks).to(tl.int64) * num_tokens + start) * C + channel[None, :] + token * C
    # otherwise a lane would hold neighbouring channels, and the scan would have to transpose the tile
    tokens = tl.multiple_of(tokens, (1, 1))
    mask = (token < num_tokens - start) & (channel < C)[None, :]
    return channel, channel < C, tokens, mask, index.to(tl.int64) * C + channel, tl.minimum(num_tokens - start, L)


@triton.jit
def load_tile(pointers, mask, MASKED: tl.constexpr):
    """Load a tile in its own dtype, 0 where masked; the caller converts it."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointers, tile, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)
    else:
        tl.store(pointers, tile.to(pointers.dtype.element_ty))


@triton.jit
def where_valid(mask, tile, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.where(mask, tile, other)
    else:
        return tile


@triton.jit
def reference_exponent(k, mask, fade, L: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Each channel's reference exponent (that of its largest key), and where the span is too wide for one exponent."""
    high = fold(where_valid(mask, k, -float("inf"), MASKED), larger, L, BLOCK)
    low = fold(where_valid(mask, k, float("inf"), MASKED), smaller, L, BLOCK)
    reference = tl.floor(bounded(high, KEY_LIMIT) * LOG2E + 0.5).to(tl.int32)
    # decaying weights may underflow; growing ones reach at most 2^(L/2) in a chunk, unless lam has an exponent above 0
    return reference, ((high - low) * LOG2E > NARROW) | (tl.abs(high) > KEY_LIMIT) | (fade > 0)


@triton.jit
def store_reference(pointers, reference, wide, lane_mask):
    tl.store(pointers.to(tl.pointer_type(tl.int32)), tl.where(wide, TOO_WIDE, reference), mask=lane_mask)


@triton.jit
def load_reference(pointers, lane_mask):
    """A chunk's reference exponent and where it is too wide for one, as stored by `store_reference`."""
    reference = exponent(pointers, lane_mask)
    return reference, reference == TOO_WIDE


@triton.jit
def out_of_range(own_n, left, right, reference):
    """Where the bonus or an entering state is too far from the chunk's reference for the narrow path."""
    return (tl.abs(own_n).to(tl.float32) > NARROW) | (tl.maximum(left[0], right[0]) - reference > NARROW_STATE)


@triton.jit
def any_lane(lanes):
    return tl.reduce(lanes.to(tl.int32), 0, either) != 0


@triton.jit
def weights(k, mask, reference, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """e^k of every token as 2^n m; n is the chunk's (a row) on the narrow path, the token's (a tile) on the wide."""
    if WIDE:
        n, m = split(k)
        return where_valid(mask, n, EMPTY, MASKED), where_valid(mask, m, 0.0, MASKED)
    else:
        return reference, where_valid(mask, mantissa(k, reference.to(tl.float32)[None, :]), 0.0, MASKED)


@triton.jit
def scan(
    E, a, b, n, a1, b1, fade, lam, count,
    L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scan token by token from the state (a, b) 2^E: state <- lam state + (a1, b1) 2^n.

    Returns the states before every token (tiles; on the narrow path one row of exponents) and the one after the last.
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
    """Scan the first `count` rows in a loop, not unrolled because wide chunks are rare, selecting rows by masks."""
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
def normalize(E, a, b, size):
    """Rescale a state so that size, a bound of a and b, is in [1, 2). In the pair's precision."""
    raised = (size.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    shift = tl.minimum(raised - 127, 126)
    scale = power(-shift).to(size.dtype)
    return tl.where(raised == 0, EMPTY, E + shift), a * scale, b * scale


@triton.jit
def exponent(pointers, lane_mask):
    empty: tl.constexpr = EMPTY
    return tl.load(pointers.to(tl.pointer_type(tl.int32)), mask=lane_mask, other=empty)


@triton.jit
def load_state(states, state, side, stride, lane_mask):
    """Load the state that enters a chunk from one side: (exponent, a, b)."""
    E = exponent(states + side * stride + state, lane_mask)
    a = tl.load(states + (2 + side) * stride + state, mask=lane_mask, other=0.0)
    b = tl.load(states + (4 + side) * stride + state, mask=lane_mask, other=0.0)
    return E, a, b


@triton.jit
def store_state(states, state, side, stride, lane_mask, E, a, b):
    tl.store((states + side * stride + state).to(tl.pointer_type(tl.int32)), E, mask=lane_mask)
    tl.store(states + (2 + side) * stride + state, a.to(tl.float32), mask=lane_mask)
    tl.store(states + (4 + side) * stride + state, b.to(tl.float32), mask=lane_mask)


@triton.jit
def rebase(state, reference, WIDE: tl.constexpr):
    """Convert an entering state to the chunk's exponent on the narrow path; return it unchanged on the wide one."""
    E, a, b = state
    if WIDE:
        return E, a, b
    else:
        scale = power(tl.minimum(E - reference, 127))
        return reference, a * scale, b * scale


@triton.jit
def empty_state(reference, WIDE: tl.constexpr):
    """A state without tokens."""
    zero = tl.full(reference.shape, 0.0, tl.float32)
    if WIDE:
        return tl.full(reference.shape, EMPTY, tl.int32), zero, zero
    else:
        return reference, zero, zero


@triton.jit
def adapt_factor(n, m, WIDE: tl.constexpr):
    """Return a factor 2^n m as (n, m) on the wide path, as (0, 2^n m) on the narrow one."""
    if WIDE:
        return n, m
    else:
        return n * 0, m * power(tl.minimum(n, 127))


@triton.jit
def product_scale(n, E, WIDE: tl.constexpr):
    """2^(n + E), the scale of the product of a forward and a backward state (or token): at most about 1."""
    if WIDE:
        return power(tl.minimum(n + E, 127))
    else:
        return 1.0


@triton.jit
def total(An, ax, ae, Rn, rx, re, own_n, x, e, WIDE: tl.constexpr):
    """Add left state, right state and the token itself: (exponent, numerator, denominator, the token's part)."""
    if WIDE:
        top = tl.maximum(tl.maximum(An, Rn), own_n)
        left = power(An - top)
        right = power(Rn - top)
        own = power(own_n - top)
        return top, ax * left + rx * right + x * own, ae * left + re * right + e * own, e * own
    else:
        return An, ax + rx + x, ae + re + e, e
