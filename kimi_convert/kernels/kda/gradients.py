"""Gradients of a chunk's inputs, for all chunks at once, when both ways of the state are known.

With S the state before the chunk, dS the gradient of the one after it, x = (I + A)^-T ddelta and
r = v - exp(G) k S, two kernels compute, the first over value channels,

    dv = beta x,   dbeta_i = x_i . r_i,   dreads = tril(do delta^T),   dA = -stril(x delta^T)

and the second over key channels the gradients of q, k and G that pass through

    exp(G) q by do S^T,   exp(G) k by -dv S^T,   exp(G_C - G) k by delta dS^T,   exp(G_C) by S dS

and through the pairs exp(G_i - G_j), which are factored as in `intra`. What q and k get in a row of
a pair counts for G_i, what k gets in a column against G_j; g_t has its part in all G_i, i >= t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.kda.device import from_middle, locate_chunk
from kimi_convert.kernels.kda.intra import Chunks
from kimi_convert.kernels.kda.problem import TILE_K, Problem
from kimi_convert.kernels.kda.scan import Scanned
from kimi_convert.kernels.kda.scan_backward import ScanGradients

LOG2_E = tl.constexpr(1.4426950408889634)
# As in `intra`, but one factor alone multiplies a sum of gradients before the other does: half the
# range is left to them.
FACTOR_LIMITS = {torch.bfloat16: 60.0, torch.float16: 3.0, torch.float32: 4.0}
TILE_V = 64  # value channels at a time


class Gradients(NamedTuple):
    """Of the inputs; those of q and k for every value head."""

    q: Tensor  # [B, T, HV, K]
    k: Tensor  # [B, T, HV, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K] fp32
    beta: Tensor  # [B, T, HV] fp32


@triton.jit
def kda_value_gradients_kernel(
    # inputs
    v,  # [T, HV, V]
    beta,  # [T, HV]
    d_o,  # [T, HV, V]
    kd,  # [N, HV, C, BK], N chunks
    inverse,  # [N, HV, C, C]
    states,  # [N, HV, BV, BK]
    deltas,  # [N, HV, BV, C]
    d_deltas,  # [N, HV, BV, C]
    cu_seqlens,
    chunk_offsets,
    # outputs
    d_v,  # [T, HV, V]
    d_beta,  # [T, HV], the part of the values
    d_reads,  # [N, HV, C, C]
    d_a,  # [N, HV, C, C]
    # sizes
    length,
    num_chunks,
    num_sequences,
    HV,
    # meta
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_V: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one chunk of one value head; the program ids are (chunk of all sequences, head)."""
    i_c = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    i_ch = i_c * HV + i_h
    DTYPE: tl.constexpr = kd.dtype.element_ty
    start, stop = locate_chunk(
        i_c, cu_seqlens, chunk_offsets, length, num_chunks, num_sequences, C, BN, PACKED
    )
    i = tl.arange(0, C)
    row, column = i[:, None], i[None, :]
    m_t = i < stop - start
    p_cc = i_ch * C * C + row * C + column
    b_inverse = tl.load(inverse + p_cc)
    b_beta = tl.load(beta + (start + i) * HV + i_h, mask=m_t, other=0).to(tl.float32)
    b_dbeta = tl.zeros([C], tl.float32)
    b_dreads = tl.zeros([C, C], tl.float32)
    b_da = tl.zeros([C, C], tl.float32)
    for i_v in range(0, BV, TILE_V):
        o_v = i_v + tl.arange(0, TILE_V)
        p_tv = ((start + row) * HV + i_h) * V + o_v[None, :]
        m_tv = m_t[:, None] & (o_v < V)[None, :]
        p_vc = (i_ch * BV + o_v[:, None]) * C + column
        b_delta = tl.load(deltas + p_vc)
        x = tl.dot(tl.load(d_deltas + p_vc), b_inverse, input_precision=PRECISION)
        rest = tl.trans(tl.load(v + p_tv, mask=m_tv, other=0)).to(tl.float32)
        for i_k in range(0, BK, TILE_K):
            o_k = i_k + tl.arange(0, TILE_K)
            b_state = tl.load(states + (i_ch * BV + o_v[:, None]) * BK + o_k[None, :])
            b_kd = tl.load(kd + i_ch * C * BK + row * BK + o_k[None, :])
            rest -= tl.dot(b_state, tl.trans(b_kd), input_precision=PRECISION)
        b_dbeta += tl.sum(x * rest, 0)
        tl.store(d_v + p_tv, tl.trans(x * b_beta[None, :]).to(d_v.dtype.element_ty), mask=m_tv)
        b_x = tl.trans(x.to(DTYPE))
        b_do = tl.load(d_o + p_tv, mask=m_tv, other=0).to(DTYPE)
        b_da = tl.dot(b_x, b_delta, acc=b_da, input_precision=PRECISION)
        b_dreads = tl.dot(b_do, b_delta, acc=b_dreads, input_precision=PRECISION)
    tl.store(d_beta + (start + i) * HV + i_h, b_dbeta, mask=m_t)
    tl.store(d_reads + p_cc, tl.where(row >= column, b_dreads, 0).to(DTYPE))
    tl.store(d_a + p_cc, tl.where(row > column, -b_da, 0).to(DTYPE))


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
        b_dk_row = tl.zeros([C, TILE_K], tl.float32)
        b_dk_column = tl.zeros([C, TILE_K], tl.float32)
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
            b_dk_row = tl.dot(b_dv, b_state, acc=b_dk_row, input_precision=PRECISION)
            b_dk_column = tl.dot(b_delta, b_dstate, acc=b_dk_column, input_precision=PRECISION)
            b_ddecay += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 0)
        b_g = tl.load(g + p_tk, mask=m_tk, other=0).to(tl.float32) * LOG2_E
        b_g = tl.maximum(b_g, -200.0, propagate_nan=tl.PropagateNan.ALL)
        b_q = tl.load(q + p_qk, mask=m_tk, other=0).to(tl.float32) * scale
        b_k = tl.load(k + p_qk, mask=m_tk, other=0).to(tl.float32)
        total = tl.sum(b_g, 0)
        if EXACT:
            before = tl.dot((row >= column).to(tl.float32), b_g, input_precision="tf32x3")
            after = tl.dot((row < column).to(tl.float32), b_g, input_precision="tf32x3")
        else:
            before = tl.cumsum(b_g, 0)
            after = total[None, :] - before
        b_dq *= tl.exp2(before)
        b_dk_row *= -tl.exp2(before)
        b_dk_column *= tl.exp2(after)
        # What passes through exp(G_C - G_j) counts for the g after j. Summed without j itself, which
        # may be as much larger as the decay is strong.
        earlier = (row > column).to(tl.float32)
        b_dg = tl.dot(earlier, b_k * b_dk_column, input_precision="tf32x3")
        b_dg += (tl.exp2(total) * b_ddecay)[None, :]
        b_dk_after = b_dk_column
        b_dk_column = tl.zeros([C, TILE_K], tl.float32)

        # Through the pairs.
        steepest = tl.maximum(-tl.min(tl.min(b_g, 1), 0), 1e-3)
        levels = tl.ceil(tl.log2(steepest * (C // 2) / FACTOR_LIMIT)).to(tl.int32)
        levels = tl.minimum(tl.maximum(levels, 0), LOG_C)
        for level in range(levels + 1):
            distance = from_middle(b_g, before, LOG_C - level, C, EXACT)
            last = level == levels
            rises = tl.exp2(tl.where(last, distance, -tl.abs(distance)))
            falls = tl.exp2(tl.where(last, -distance, -tl.abs(distance)))
            joined = (last & (apart < (C >> level))) | ((apart >> (LOG_C - 1 - level)) == 1)
            b_column = (b_k * falls).to(DTYPE)
            pairs = tl.where(joined, b_dreads, 0.0)
            b_dq += rises * tl.dot(pairs, b_column, input_precision=PRECISION)
            b_dk_column += falls * tl.dot(
                tl.trans(pairs), (b_q * rises).to(DTYPE), input_precision=PRECISION
            )
            pairs = tl.where(joined, b_da, 0.0)
            d_row = rises * tl.dot(pairs, b_column, input_precision=PRECISION)
            b_dk_row += b_beta * d_row
            b_dbeta += tl.sum(b_k * d_row, 1)
            b_dk_column += falls * tl.dot(
                tl.trans(pairs), (b_k * rises * b_beta).to(DTYPE), input_precision=PRECISION
            )

        b_dg += tl.cumsum(b_q * b_dq + b_k * (b_dk_row - b_dk_column), 0, reverse=True)
        b_dq += own * b_k
        b_dk_column += b_dk_after + own * b_q
        tl.store(d_q + p_tk, (b_dq * scale).to(d_q.dtype.element_ty), mask=m_tk)
        tl.store(d_k + p_tk, (b_dk_row + b_dk_column).to(d_k.dtype.element_ty), mask=m_tk)
        tl.store(d_g + p_tk, b_dg, mask=m_tk)
    tl.store(d_beta + (start + i) * HV + i_h, b_dbeta, mask=m_t)


def kda_gradients(
    problem: Problem,
    chunks: Chunks,
    scanned: Scanned,
    d_output: Tensor,
    d_scan: ScanGradients,
) -> Gradients:
    """Run both kernels; d_output [B, T, HV, V] is contiguous."""
    p = problem
    shape = p.v.shape[:3]
    # Heads that share a query and a key: their gradients are summed, so not rounded before.
    dtype = p.q.dtype if p.H == p.HV else torch.float32
    gradients = Gradients(
        q=p.empty(*shape, p.K, dtype=dtype),
        k=p.empty(*shape, p.K, dtype=dtype),
        v=torch.empty_like(p.v),
        g=p.empty(*shape, p.K, dtype=torch.float32),
        beta=p.empty(*shape, dtype=torch.float32),
    )
    d_reads, d_a = torch.empty_like(chunks.reads), torch.empty_like(chunks.reads)
    kept = (scanned.states, scanned.deltas)
    where = (p.cu_seqlens, p.chunk_offsets)
    meta = {
        "C": p.C,
        "V": p.V,
        "BK": p.BK,
        "BV": p.BV,
        "BN": p.BN,
        "TILE_K": TILE_K,
        "TILE_V": min(TILE_V, p.BV),
        "PACKED": p.packed,
        "PRECISION": p.precision,
        "num_warps": 4,
        "num_stages": 1,
    }
    kda_value_gradients_kernel[(p.total_chunks, p.HV)](
        *(p.v, p.beta, d_output, chunks.kd, chunks.inverse, *kept, d_scan.deltas, *where),
        *(gradients.v, gradients.beta, d_reads, d_a),
        *(p.T, p.num_chunks, p.N, p.HV),
        **meta,
    )
    kda_key_gradients_kernel[(p.total_chunks, p.HV)](
        *(
            p.q,
            p.k,
            p.g,
            p.beta,
            d_output,
            gradients.v,
            d_reads,
            d_a,
            *kept,
            d_scan.states,
            *where,
        ),
        *(gradients.q, gradients.k, gradients.g, gradients.beta),
        *(p.T, p.num_chunks, p.N, p.H, p.HV, p.scale),
        K=p.K,
        LOG_C=p.C.bit_length() - 1,
        FACTOR_LIMIT=FACTOR_LIMITS[p.dtype],
        **meta,
    )
    return gradients
