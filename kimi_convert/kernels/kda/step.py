"""One token of KDA on a state in registers, as device functions that the decode kernels share.

The new S is the decayed one plus k u^T, so o = S^T q + (q . k) u of the decayed S: one pass over S
serves the read of u and that of o.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_convert.kernels.kda.device import sum_two


@triton.jit
def unit_scales(b_q, b_k):
    """Return what makes q [K] and k [K] of unit length; see `unit_scale`."""
    q_squares, k_squares = sum_two(b_q * b_q, b_k * b_k)
    return tl.rsqrt(q_squares + 1e-6), tl.rsqrt(k_squares + 1e-6)


@triton.jit
def step_state(state, b_q, b_k, b_v, decay, b_beta):
    """Take one token: return the new state [K, V] and the output [V].

    Args:
        state: [K, V] fp32.
        b_q, b_k: [K] fp32, q scaled.
        b_v: [V] fp32.
        decay: [K] fp32, from 0 to 1.
        b_beta: scalar.
    """
    state *= decay[:, None]
    seen, read = sum_two(state * b_k[:, None], state * b_q[:, None])
    u = b_beta * (b_v - seen)
    return state + b_k[:, None] * u[None, :], read + tl.sum(b_q * b_k, 0) * u
