"""What every Triton kernel of KDA does to its inputs, as device functions.

Log decays are base 2 inside the kernels (exp2 is one instruction) and natural outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Gate laws: what the gate input is.
PRECOMPUTED = tl.constexpr(0)  # the natural log decay itself
SOFTPLUS = tl.constexpr(1)  # f of g = -exp(A_log) softplus(f + dt_bias)
BOUNDED = tl.constexpr(2)  # f of g = L sigmoid(exp(A_log) (f + dt_bias))


@triton.jit
def log2_decay(f, rate, bias, lower_bound, LAW: tl.constexpr):
    """Return the base-2 log decay, <= 0, of gate inputs f in fp32.

    Args:
        f: any shape, fp32; a natural log decay where LAW is PRECOMPUTED.
        rate: exp(A_log), broadcast to f; not read where LAW is PRECOMPUTED.
        bias: dt_bias, broadcast to f; not read where LAW is PRECOMPUTED.
        lower_bound: L, natural log, < 0; read where LAW is BOUNDED.
        LAW: one of the constants above.
    """
    if LAW == PRECOMPUTED:
        return f * LOG2_E
    x = f + bias
    if LAW == SOFTPLUS:
        return -rate * LOG2_E * softplus(x)
    return lower_bound * LOG2_E * tl.sigmoid(rate * x)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) to a few ulp in fp32, also where exp(x) is far below 1.

    1 + e rounds; log(1 + e) * e / ((1 + e) - 1) takes the same rounding out again (Kahan's
    log1p). max(x, 0) keeps exp from overflowing.
    """
    e = tl.exp(-tl.abs(x))  # in (0, 1]
    one_more = 1.0 + e
    rounded = one_more - 1.0
    log1p = tl.where(rounded == 0, e, tl.log(one_more) * (e / tl.where(rounded == 0, 1.0, rounded)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def unit_scale(x, axis: tl.constexpr):
    """Return 1 / sqrt(sum of squares + 1e-6) along an axis, kept: what makes x of unit length."""
    return tl.rsqrt(tl.sum(x * x, axis, keep_dims=True) + 1e-6)
