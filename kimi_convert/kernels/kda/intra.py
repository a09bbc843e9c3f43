"""What a chunk of C tokens does by itself, before any state is known, for all chunks at once.

With G_i = g_1 + ... + g_i per key channel, the deltas u of a chunk solve (I + A) u = beta (v -
S_0^T exp(G) k), where A_ij = beta_i k_i . exp(G_i - G_j) k_j for i > j. This stage computes

    qg       = scale exp(G) q                                 [C, K]
    kg       = exp(G_C - G) k                                 [C, K]
    reads_ij = scale q_i . exp(G_i - G_j) k_j,  i >= j        [C, C]
    solve    = (I + A)^-1 diag(beta)                          [C, C]
    w        = solve exp(G) k                                 [C, K]
    decay    = exp(G_C)                                       [K]

so that `scan` has only matrix products left to do per chunk. docs/kernels/kda.md derives it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kimi_convert.kernels.kda.chunks import Chunks, empty_chunks
from kimi_convert.kernels.kda.device import (
    PRECOMPUTED,
    dot_split,
    invert_unit_lower,
    locate_chunk,
    log2_decay,
    sum_two,
    unit_scale,
)
from kimi_convert.kernels.kda.pairs import add_pairs_at_once, add_pairs_by_halving
from kimi_convert.kernels.kda.problem import TILE_K, Problem

# How far, in log2, a gate may carry a factor from its reference row to either side. The factors
# of a pair multiply to at most 1, so the limit is the range of the operands' dtype, and in fp32
# the error of exp2, which grows with its argument.
FACTOR_LIMITS = {torch.bfloat16: 120.0, torch.float16: 6.0, torch.float32: 4.0}


@triton.jit
def kda_intra_kernel(
    # inputs
    q,  # [T, H, K]
    k,  # [T, H, K]
    g,  # [T, HV, K]
    beta,  # [T, HV]
    A_log,  # [HV]
    dt_bias,  # [HV, K]
    cu_seqlens,  # [N + 1], where PACKED
    chunk_offsets,  # [N + 1], where PACKED
    # outputs
    w,
    qg,
    kg,
    reads,
    solve,
    decay,
    kd,  # w itself where not asked for
    inverse,  # None where not asked for
    steep,  # [N, HV] int32: whether a gate carried a factor out of range
    # sizes
    length,  # tokens of a sequence, where not PACKED
    num_chunks,  # of a sequence, where not PACKED
    num_sequences,
    H,
    HV,
    scale,
    lower_bound,
    # meta
    K: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,  # K, padded
    TILE_K: tl.constexpr,  # key channels at a time
    BN: tl.constexpr,  # sequences, padded
    PACKED: tl.constexpr,
    LAW: tl.constexpr,
    QK_NORM: tl.constexpr,
    BETA_LOGITS: tl.constexpr,
    FACTOR_LIMIT: tl.constexpr,
    STEEP: tl.constexpr,  # handle the chunks that the kernel without it has marked
    PRECISION: tl.constexpr,
):
    """Compute one chunk of one value head; the program ids are (chunk of all sequences, head)."""
    i_c = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    i_ch = i_c * HV + i_h
    DTYPE: tl.constexpr = qg.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DTYPE
    if STEEP and not EXACT:
        marked = tl.load(steep + i_ch)
        if marked == 0:
            return
    start, stop = locate_chunk(
        i_c, cu_seqlens, chunk_offsets, length, num_chunks, num_sequences, C, BN, PACKED
    )
    i = tl.arange(0, C)
    row, column = i[:, None], i[None, :]
    # Rows past the end get no gate, key or beta, so they leave the state alone.
    m_t = i < stop - start
    # 64 bits for where the chunk lies, 32 for where a value lies in it.
    q += (start * H + i_h // (HV // H)) * K
    k += (start * H + i_h // (HV // H)) * K
    g += (start * HV + i_h) * K
    w += i_ch * C * BK
    kd += i_ch * C * BK
    qg += i_ch * C * BK
    kg += i_ch * C * BK
    p_qk = row * (H * K)
    p_g = row * (HV * K)
    q_factor = tl.full([C, 1], 1.0, tl.float32) * scale
    k_factor = tl.full([C, 1], 1.0, tl.float32)
    if QK_NORM:
        o_all = tl.arange(0, BK)[None, :]
        m_all = m_t[:, None] & (o_all < K)
        q_factor *= unit_scale(tl.load(q + p_qk + o_all, mask=m_all, other=0).to(tl.float32), 1)
        k_factor *= unit_scale(tl.load(k + p_qk + o_all, mask=m_all, other=0).to(tl.float32), 1)

    a_qk = tl.zeros([C, C], tl.float32)
    a_kk = tl.zeros([C, C], tl.float32)
    # Past the end and past K there is no decay.
    no_decay = 0.0 if LAW == PRECOMPUTED else float("-inf")
    worst = tl.zeros([TILE_K], tl.float32)
    rate = 0.0
    if LAW != PRECOMPUTED:
        rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    signs = ((column > C // 2 - 1) & (column <= row)).to(tl.float16)
    signs -= ((column > row) & (column <= C // 2 - 1)).to(tl.float16)
    eye = (row == column).to(DTYPE)
    for i_k in range(0, BK, TILE_K):
        o_k = i_k + tl.arange(0, TILE_K)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        p_ck = row * BK + o_k[None, :]
        b_g = tl.load(g + p_g + o_k[None, :], mask=m_tk, other=no_decay).to(tl.float32)
        b_q = tl.load(q + p_qk + o_k[None, :], mask=m_tk, other=0)
        b_k = tl.load(k + p_qk + o_k[None, :], mask=m_tk, other=0)
        bias = tl.zeros([TILE_K], tl.float32)
        if LAW != PRECOMPUTED:
            bias = tl.load(dt_bias + i_h * K + o_k, mask=m_k, other=0).to(tl.float32)
        b_g = log2_decay(b_g, rate, bias[None, :], lower_bound, LAW, EXACT)
        half, total = sum_two(tl.where(row < C // 2, b_g, 0), b_g)
        tl.store(decay + i_ch * BK + o_k, tl.exp2(total))
        if STEEP:
            a_qk, a_kk = add_pairs_by_halving(
                a_qk, a_kk, b_q.to(tl.float32) * q_factor, b_k.to(tl.float32) * k_factor, b_g,
                total, qg + p_ck, kd + p_ck, kg + p_ck, C, LOG_C, TILE_K, FACTOR_LIMIT, PRECISION,
            )  # fmt: skip
        else:
            worst = tl.maximum(worst, -tl.minimum(half, total - half))
            a_qk, a_kk = add_pairs_at_once(
                a_qk, a_kk, tl.dot(eye, b_q) * q_factor, tl.dot(eye, b_k) * k_factor,
                dot_split(signs, b_g), half, total, qg + p_ck, kd + p_ck, kg + p_ck,
            )  # fmt: skip
    if not STEEP:
        tl.store(steep + i_ch, (tl.max(worst, 0) > FACTOR_LIMIT).to(tl.int32))

    b_beta = tl.load(beta + (start + i) * HV + i_h, mask=m_t, other=0).to(tl.float32)
    if BETA_LOGITS:
        b_beta = tl.where(m_t, tl.sigmoid(b_beta), 0)
    p_cc = i_ch * C * C + row * C + column
    tl.store(reads + p_cc, tl.where(row >= column, a_qk, 0).to(DTYPE))
    a_kk = tl.where(row > column, a_kk * b_beta[:, None], 0)
    b_inverse = invert_unit_lower(a_kk, C, LOG_C, DTYPE, PRECISION)
    if inverse is not None:
        tl.store(inverse + p_cc, b_inverse.to(DTYPE))
    b_solve = (b_inverse * b_beta[None, :]).to(DTYPE)
    tl.store(solve + p_cc, b_solve)
    tl.debug_barrier()  # what this program has stored in kd is read again, by other threads
    for i_k in range(0, BK, TILE_K):
        p_ck = row * BK + i_k + tl.arange(0, TILE_K)[None, :]
        b_w = tl.dot(b_solve, tl.load(kd + p_ck), input_precision=PRECISION)
        tl.store(w + p_ck, b_w.to(DTYPE))


def kda_intra(problem: Problem, *, for_gradients: bool = False) -> Chunks:
    """Run the stage for every chunk of a problem."""
    chunks = empty_chunks(problem, for_gradients=for_gradients)
    if problem.dtype != torch.float32:
        _run(problem, chunks, steep=False)
    run_steep_chunks(problem, chunks)
    return chunks


def run_steep_chunks(problem: Problem, chunks: Chunks) -> None:
    """Do the chunks anew that are marked as steep; in fp32, where no others are done, all."""
    _run(problem, chunks, steep=True)


def _run(problem: Problem, chunks: Chunks, *, steep: bool) -> None:
    p = problem
    p.launcher(kda_intra_kernel, p.total_chunks, p.HV)(
        *(p.q, p.k, p.g, p.beta, p.A_log, p.dt_bias, p.cu_seqlens, p.chunk_offsets),
        *chunks,
        *(p.T, p.num_chunks, p.N, p.H, p.HV, p.scale, p.lower_bound),
        K=p.K,
        C=p.C,
        LOG_C=p.C.bit_length() - 1,
        BK=p.BK,
        TILE_K=TILE_K,
        BN=p.BN,
        PACKED=p.packed,
        LAW=p.law,
        QK_NORM=p.qk_norm,
        BETA_LOGITS=p.beta_logits,
        FACTOR_LIMIT=FACTOR_LIMITS[p.dtype],
        STEEP=steep,
        PRECISION=p.precision,
        num_warps=4,
        num_stages=1,
    )
