"""What every Triton kernel of KDA does to its inputs, as device functions.

Log decays are base 2 inside the kernels (exp2 is one instruction) and natural outside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kimi_convert.kernels.backend import interprets

LOG2_E = tl.constexpr(1.4426950408889634)

INTERPRETED = tl.constexpr(interprets())

# How fp32 operands are multiplied on tensor cores: each in three parts of bf16, which hold all 24
# bits, in the time of "tf32x3", whose two parts hold 21. Triton before 3.6 has the latter alone, and
# the interpreter, which multiplies in fp32 anyway, knows no other.
SINGLE_PRECISION = tl.constexpr(
    "bf16x6"
    if not interprets() and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
    else "tf32x3"
)

# Gate laws: what the gate input is.
PRECOMPUTED = tl.constexpr(0)  # the natural log decay itself
SOFTPLUS = tl.constexpr(1)  # f of g = -exp(A_log) softplus(f + dt_bias)
BOUNDED = tl.constexpr(2)  # f of g = L sigmoid(exp(A_log) (f + dt_bias))


@triton.jit
def log2_decay(f, rate, bias, lower_bound, LAW: tl.constexpr, PRECISE: tl.constexpr):
    """Return the base-2 log decay, from -200 to 0, of gate inputs f in fp32.

    A decay of 2^-200 forgets all there is; -inf would give inf - inf. NaN stays NaN.

    Args:
        f: any shape, fp32; a natural log decay where LAW is PRECOMPUTED. -inf means no decay under
            the two other laws.
        rate: exp(A_log), broadcast to f; not read where LAW is PRECOMPUTED.
        bias: dt_bias, broadcast to f; not read where LAW is PRECOMPUTED.
        lower_bound: L, natural log, < 0; read where LAW is BOUNDED.
        LAW: one of the constants above.
        PRECISE: relative error of a few ulp also where the decay is weak; else 2^-24 absolute.
    """
    if LAW == PRECOMPUTED:
        decay = f * LOG2_E
    elif LAW == SOFTPLUS:
        decay = -rate * log2_softplus(f + bias, PRECISE)
    else:
        decay = lower_bound * LOG2_E * tl.sigmoid(rate * (f + bias))
    return tl.maximum(decay, -200.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2_softplus(x, PRECISE: tl.constexpr):
    """Return log2(1 + exp(x)).

    1 + e rounds; log(1 + e) * e / ((1 + e) - 1) takes the same rounding out again (Kahan's
    log1p). Where x is large, exp(x) overflows, but log2(1 + exp(x)) is x log2(e).
    """
    y = x * LOG2_E
    e = tl.exp2(y)
    more = 1.0 + e
    if PRECISE:
        rounded = more - 1.0
        log1p = tl.log2(more) * (e / tl.where(rounded == 0, 1, rounded))
        log1p = tl.where(rounded == 0, e * LOG2_E, log1p)
    else:
        log1p = log2_approx(more)
    return tl.where(y > 24.0, y, log1p)


@triton.jit
def log2_approx(x):
    """Return log2(x) in one instruction of the GPU; tl.log2 takes thirteen more."""
    if INTERPRETED:
        return tl.log2(x)
    return libdevice.fast_log2f(x)


@triton.jit
def unit_scale(x, axis: tl.constexpr):
    """Return 1 / sqrt(sum of squares + 1e-6) along an axis, kept: what makes x of unit length."""
    return tl.rsqrt(tl.sum(x * x, axis, keep_dims=True) + 1e-6)


@triton.jit
def halvings(g, limit, LOG_C: tl.constexpr, K: tl.constexpr):
    """Return how often C rows are halved until no half of a block sums to less than -limit.

    Args:
        g: [C, K] fp32, <= 0.
        limit: > 0.
        LOG_C: log2 of the rows.
        K: columns.
    """
    levels = 0
    sums = g
    for exponent in tl.static_range(LOG_C):  # halves of 2**exponent rows
        levels += (-tl.min(tl.min(sums, 1), 0) > limit).to(tl.int32)
        sums = tl.sum(tl.reshape(sums, (2 ** (LOG_C - 1 - exponent), 2, K)), 1)
    return levels


@triton.jit
def from_middle(g, before, shift, C: tl.constexpr, SUMMED: tl.constexpr):
    """Return for every row the sum of g from the middle of its block of rows to it.

    Rows right of the middle get g_{m+1} + ... + g_i, rows left of it -(g_{i+1} + ... + g_m), with m
    the last row of the block's left half.

    Args:
        g: [C, K] fp32, at least -200.
        before: [C, K] fp32, g_1 + ... + g_i.
        shift: log2 of the rows of a block.
        C: rows.
        SUMMED: sum anew, so that no digits are lost where strong and weak gates meet; else
            subtract running sums, which loses those below 2^-10 at worst.
    """
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    middle = ((i >> shift) << shift) + tl.maximum((1 << shift) // 2, 1) - 1
    if SUMMED:
        signs = ((t > middle) & (t <= i)).to(tl.float32) - ((t > i) & (t <= middle)).to(tl.float32)
        distance = tl.dot(signs, g, input_precision=SINGLE_PRECISION)
    else:
        distance = before - select_rows((t == middle).to(tl.float16), before)
    return distance


@triton.jit
def add_two(a, b, c, d):
    """Add pairs, to sum two tensors in one reduction."""
    return a + c, b + d


@triton.jit
def sum_two(a, b):
    """Sum two tensors along axis 0, on a GPU in one reduction: with fewer waits between warps."""
    if INTERPRETED:  # it would call a Python function for every element
        return tl.sum(a, 0), tl.sum(b, 0)
    return tl.reduce((a, b), 0, add_two)


@triton.jit
def dot_split(choice, x):
    """Return choice @ x for fp16 choice of 0, 1 and -1, and fp32 x below 2^16, to 22 bits of x."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return tl.dot(choice, low, acc=tl.dot(choice, high))


@triton.jit
def select_rows(choice, x):
    """Return choice @ x for a choice of 0 and 1 and fp32 x below 2^16, exact to 2^-24.

    Three fp16 parts hold all digits of x, and products with 0 and 1 do not round.
    """
    high = x.to(tl.float16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.float16)
    low = (rest - middle.to(tl.float32)).to(tl.float16)
    return tl.dot(choice, high) + tl.dot(choice, middle) + tl.dot(choice, low)


@triton.jit
def invert_unit_lower(
    a, C: tl.constexpr, LOG_C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """Return (I + a)^-1 of a strictly lower triangular a [C, C] fp32, by doubling blocks.

    [[X, 0], [L, Y]]^-1 = [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]]. For keys of unit length the entries are
    those of products of contractions, at most 1, so fp16 holds them with more digits than bf16.
    """
    OPERAND: tl.constexpr = tl.float32 if tl.float32 == DTYPE else tl.float16
    apart = tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, a, 0.0)
    for exponent in tl.static_range(1, LOG_C):
        # The highest bit in which row and column differ tells the doubling that joins them.
        block = tl.where((apart >> exponent) == 1, a, 0.0).to(OPERAND)
        known = inverse.to(OPERAND)
        left = tl.dot(known, block, input_precision=PRECISION).to(OPERAND)
        inverse -= tl.dot(left, known, input_precision=PRECISION)
    return inverse


@triton.jit
def locate_chunk(
    i_c, cu_seqlens, chunk_offsets, length, num_chunks, num_sequences,
    C: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the first token of chunk i_c of all sequences, and the end of its sequence.

    Where there are fewer chunks than programs, the start of a surplus chunk is past the end.
    """
    if PACKED:
        o_n = tl.arange(0, BN)
        lasts = tl.load(chunk_offsets + o_n + 1, mask=o_n < num_sequences, other=2147483647)
        i_n = tl.minimum(tl.sum((lasts <= i_c).to(tl.int32), 0), num_sequences - 1)
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        start += (i_c - tl.load(chunk_offsets + i_n)) * C
        stop = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    else:
        i_n = i_c // num_chunks
        start = i_n * length + (i_c - i_n * num_chunks) * C
        stop = (i_n + 1) * length
    return start, stop


@triton.jit
def locate_sequence(i_n, cu_seqlens, chunk_offsets, length, num_chunks, PACKED: tl.constexpr):
    """Return a sequence's first token, its tokens, its first chunk of all, and its chunks."""
    if PACKED:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        tokens = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
        first_chunk = tl.load(chunk_offsets + i_n).to(tl.int64)
        num_chunks = tl.load(chunk_offsets + i_n + 1) - tl.load(chunk_offsets + i_n)
    else:
        start = i_n * length
        tokens = length
        first_chunk = i_n * num_chunks
    return start, tokens, first_chunk, num_chunks
