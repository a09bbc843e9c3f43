"""Gradients of a chunk over its key channels, for all chunks at once.

With S the state before the chunk and dS the gradient of the one after it, q, k and G get theirs
through

    exp(G) q by do S^T,   exp(G) k by -dv S^T,   exp(G_C - G) k by delta dS^T,   exp(G_C) by S dS

and through the pairs exp(G_i - G_j), which are factored as in `pairs`. What q and k get in a row of
a pair counts for G_i, what k gets in a column against G_j; g_t has its part in all G_i, i >= t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_convert.kernels.kda.device import (
    LOG2_E,
    SINGLE_PRECISION,
    from_middle,
    halvings,
    locate_chunk,
)


@triton.jit
def kda_key_gradients_kernel(
    # inputs
    q,  # [T, H, K]
    k,  # [T, H, K]
    g,  # [T, HV, K], natural log
    beta,  # [T, HV]
    d_o,  # [T, HV, V]
    d_v,  # [T, HV, V]
    d_reads,  # [N, HV, C, C], N chunks
    d_a,  # [N, HV, C, C]
    states,  # [N, HV, BV, BK]
    deltas,  # [N, HV, BV, C]
    d_states,  # [N, HV, BV, BK]
    cu_seqlens,
    chunk_offsets,
    # outputs
    d_q,  # [T, HV, K]
    d_k,  # [T, HV, K]
    d_g,  # [T, HV, K]
    d_beta,  # [T, HV], added to
    # sizes
    length,
    num_chunks,
    num_sequences,
    H,
    HV,
    scale,
    # meta
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_V: tl.constexpr,
    PACKED: tl.constexpr,
    FACTOR_LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one chunk of one value head; the program ids are (chunk of all sequences, head)."""
    i_c = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    i_ch = i_c * HV + i_h
    DTYPE: tl.constexpr = states.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    start, stop = locate_chunk(
        i_c, cu_seqlens, chunk_offsets, length, num_chunks, num_sequences, C, BN, PACKED
    )
    i = tl.arange(0, C)
    row, column = i[:, None], i[None, :]
    apart = row ^ column
    m_t = i < stop - start
    p_cc = i_ch * C * C + row * C + column
    b_dreads = tl.load(d_reads + p_cc)
    # A token's read of its own write has no decay: kept apart, it cannot leave a rounding error
    # in the gradient of g, which is far smaller than its parts where the decay is strong.
    own = tl.sum(tl.where(row == column, b_dreads.to(tl.float32), 0), 1)[:, None]
    b_dreads = tl.where(row == column, 0.0, b_dreads)
    b_da = tl.load(d_a + p_cc)
    b_beta = tl.load(beta + (start + i) * HV + i_h, mask=m_t, other=0).to(tl.float32)[:, None]
    b_dbeta = tl.load(d_beta + (start + i) * HV + i_h, mask=m_t, other=0)
    for i_k in range(0, BK, TILE_K):
        o_k = i_k + tl.arange(0, TILE_K)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        p_qk = ((start + row) * H + i_h // (HV // H)) * K + o_k[None, :]
        p_tk = ((start + row) * HV + i_h) * K + o_k[None, :]

        # Through the state before and the state after.
        b_dq = tl.zeros([C, TILE_K], tl.float32)
        b_dk = tl.zeros([C, TILE_K], tl.float32)
        b_dk_after = tl.zeros([C, TILE_K], tl.float32)
        b_ddecay = tl.zeros([TILE_K], tl.float32)
        for i_v in range(0, BV, TILE_V):
            o_v = i_v + tl.arange(0, TILE_V)
            p_tv = ((start + row) * HV + i_h) * V + o_v[None, :]
            m_tv = m_t[:, None] & (o_v < V)[None, :]
            p_vk = (i_ch * BV + o_v[:, None]) * BK + o_k[None, :]
            b_state = tl.load(states + p_vk)
            b_dstate = tl.load(d_states + p_vk)
            b_do = tl.load(d_o + p_tv, mask=m_tv, other=0).to(DTYPE)
            b_dv = tl.load(d_v + p_tv, mask=m_tv, other=0).to(DTYPE)
            b_delta = tl.trans(tl.load(deltas + (i_ch * BV + o_v[:, None]) * C + column))
            b_dq = tl.dot(b_do, b_state, acc=b_dq, input_precision=PRECISION)
            b_dk = tl.dot(b_dv, b_state, acc=b_dk, input_precision=PRECISION)
            b_dk_after = tl.dot(b_delta, b_dstate, acc=b_dk_after, input_precision=PRECISION)
            b_ddecay += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 0)
        b_g = tl.load(g + p_tk, mask=m_tk, other=0).to(tl.float32) * LOG2_E
        b_g = tl.maximum(b_g, -200.0, propagate_nan=tl.PropagateNan.ALL)
        b_q = tl.load(q + p_qk, mask=m_tk, other=0).to(tl.float32) * scale
        b_k = tl.load(k + p_qk, mask=m_tk, other=0).to(tl.float32)
        total = tl.sum(b_g, 0)
        if EXACT:
            before = tl.dot((row >= column).to(tl.float32), b_g, input_precision=SINGLE_PRECISION)
            after = tl.dot((row < column).to(tl.float32), b_g, input_precision=SINGLE_PRECISION)
        else:
            before = tl.cumsum(b_g, 0)
            after = total[None, :] - before
        b_dq *= tl.exp2(before)
        b_dk *= -tl.exp2(before)
        passed = b_q * b_dq + b_k * b_dk
        b_dk_after *= tl.exp2(after)
        # What passes through exp(G_C - G_j) counts for the g after j. Summed without j itself, which
        # may be as much larger as the decay is strong.
        earlier = (row > column).to(tl.float32)
        b_dg = tl.dot(earlier, b_k * b_dk_after, input_precision=SINGLE_PRECISION)
        b_dg += (tl.exp2(total) * b_ddecay)[None, :]
        b_dk += b_dk_after

        # Through the pairs.
        levels = halvings(b_g, FACTOR_LIMIT, LOG_C, TILE_K)
        for level in range(levels + 1):
            distance = from_middle(b_g, before, LOG_C - level, C, EXACT)
            last = level == levels
            rises = tl.exp2(tl.where(last, distance, -tl.abs(distance)))
            falls = tl.exp2(tl.where(last, -distance, -tl.abs(distance)))
            joined = (last & (apart < (C >> level))) | ((apart >> (LOG_C - 1 - level)) == 1)
            b_column = (b_k * falls).to(DTYPE)
            # What a pair gives to its row and takes from its column cancels for all tokens before
            # both, to the last bit if it is made of the same factors: as they were multiplied.
            pairs = tl.where(joined, b_dreads, 0.0)
            b_row = (b_q * rises).to(DTYPE)
            d_row = tl.dot(pairs, b_column, input_precision=PRECISION)
            d_column = tl.dot(tl.trans(pairs), b_row, input_precision=PRECISION)
            b_dq += rises * d_row
            passed += b_row.to(tl.float32) * d_row
            pairs = tl.where(joined, b_da, 0.0)
            b_row = (b_k * rises * b_beta).to(DTYPE)
            d_row = tl.dot(pairs, b_column, input_precision=PRECISION)
            d_column = tl.dot(tl.trans(pairs), b_row, acc=d_column, input_precision=PRECISION)
            b_dk += b_beta * rises * d_row + falls * d_column
            b_dbeta += tl.sum(b_k * rises * d_row, 1)
            passed += b_row.to(tl.float32) * d_row - b_column.to(tl.float32) * d_column

        # Not a reversed cumsum: on a GPU, that of Triton 3.6 is wrong here.
        later = (row <= column).to(tl.float32)
        b_dg = tl.dot(later, passed, acc=b_dg, input_precision=SINGLE_PRECISION)
        b_dq += own * b_k
        b_dk += own * b_q
        tl.store(d_q + p_tk, (b_dq * scale).to(d_q.dtype.element_ty), mask=m_tk)
        tl.store(d_k + p_tk, b_dk.to(d_k.dtype.element_ty), mask=m_tk)
        tl.store(d_g + p_tk, b_dg, mask=m_tk)
    tl.store(d_beta + (start + i) * HV + i_h, b_dbeta, mask=m_t)
