"""The decayed products of a chunk's pairs of tokens, and its decayed rows, a tile of channels each.

reads_ij = q_i . exp(G_i - G_j) k_j and the same for k_i. exp(G_i) exp(-G_j) would overflow, so both
factors are taken relative to a row between i and j; docs/kernels/kda.md says which.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_convert.kernels.kda.device import SINGLE_PRECISION, from_middle, halvings


@triton.jit
def add_pairs_at_once(a_qk, a_kk, b_q, b_k, distance, half, total, p_qg, p_kd, p_kg):
    """Add what TILE_K channels give to the pairs, where one pair of factors serves the chunk.

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j) with m the middle row. Entries above the diagonal
    may be anything, also infinite.

    Args:
        a_qk, a_kk: [C, C] fp32, added to.
        b_q, b_k: [C, TILE_K] fp32.
        distance: [C, TILE_K], log2 of exp(G_i - G_m).
        half, total: [TILE_K], log2 of exp(G_m) and exp(G_C).
        p_qg, p_kd, p_kg: [C, TILE_K], where these outputs go.
    """
    DTYPE: tl.constexpr = p_qg.dtype.element_ty
    rises = tl.exp2(distance)
    falls = tl.exp2(-distance)
    b_q = b_q * rises
    b_kf = b_k * falls
    b_k = b_k * rises
    b_column = tl.trans(b_kf.to(DTYPE))
    a_qk = tl.dot(b_q.to(DTYPE), b_column, acc=a_qk)
    a_kk = tl.dot(b_k.to(DTYPE), b_column, acc=a_kk)
    factor = tl.exp2(half)[None, :]
    tl.store(p_qg, (b_q * factor).to(DTYPE))
    tl.store(p_kd, (b_k * factor).to(DTYPE))
    tl.store(p_kg, (b_kf * tl.exp2(total - half)[None, :]).to(DTYPE))
    return a_qk, a_kk


@triton.jit
def add_pairs_by_halving(
    a_qk, a_kk, b_q, b_k, b_g, total, p_qg, p_kd, p_kg,
    C: tl.constexpr, LOG_C: tl.constexpr, TILE_K: tl.constexpr, FACTOR_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do the same for any gates: halve blocks of rows until no factor leaves the dtype's range.

    A level joins the rows of the right half of every block with those of the left half; both
    factors are at most 1. The last level joins all that is left within a block.
    """
    DTYPE: tl.constexpr = p_qg.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    i = tl.arange(0, C)
    row, column = i[:, None], i[None, :]
    apart = row ^ column
    if EXACT:
        before = tl.dot((row >= column).to(tl.float32), b_g, input_precision=SINGLE_PRECISION)
        after = tl.dot((row < column).to(tl.float32), b_g, input_precision=SINGLE_PRECISION)
    else:
        before = tl.cumsum(b_g, 0)
        after = total[None, :] - before
    factor = tl.exp2(before)
    tl.store(p_qg, (b_q * factor).to(DTYPE))
    tl.store(p_kd, (b_k * factor).to(DTYPE))
    tl.store(p_kg, (b_k * tl.exp2(after)).to(DTYPE))
    levels = halvings(b_g, FACTOR_LIMIT, LOG_C, TILE_K)
    for level in range(levels + 1):
        distance = from_middle(b_g, before, LOG_C - level, C, EXACT)
        last = level == levels
        rises = tl.exp2(tl.where(last, distance, -tl.abs(distance)))
        falls = tl.exp2(tl.where(last, -distance, -tl.abs(distance)))
        joined = (last & (apart < (C >> level))) | ((apart >> (LOG_C - 1 - level)) == 1)
        b_column = tl.trans((b_k * falls).to(DTYPE))
        pairs = tl.dot((b_q * rises).to(DTYPE), b_column, input_precision=PRECISION)
        a_qk += tl.where(joined, pairs, 0)
        pairs = tl.dot((b_k * rises).to(DTYPE), b_column, input_precision=PRECISION)
        a_kk += tl.where(joined, pairs, 0)
    return a_qk, a_kk
