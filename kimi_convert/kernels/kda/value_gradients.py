"""Gradients of a chunk over its value channels, for all chunks at once.

With S the state before the chunk, x = (I + A)^-T ddelta and r = v - exp(G) k S:

    dv = beta x,   dbeta_i = x_i . r_i,   dreads = tril(do delta^T),   dA = -stril(x delta^T)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.kda.chunks import Chunks
from kimi_convert.kernels.kda.device import locate_chunk
from kimi_convert.kernels.kda.problem import TILE_K, TILE_V, Problem
from kimi_convert.kernels.kda.scan import Scanned
from kimi_convert.kernels.kda.scan_backward import ScanGradients


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
    d_beta,  # [T, HV], the part of the values, of beta in (0, 1)
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
    BETA_LOGITS: tl.constexpr,
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
    if BETA_LOGITS:
        b_beta = tl.where(m_t, tl.sigmoid(b_beta), 0)
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


class ValueGradients(NamedTuple):
    """What the value channels give."""

    v: Tensor  # [B, T, HV, V]
    beta: Tensor  # [B, T, HV] fp32, the part of the values, of beta in (0, 1)
    reads: Tensor  # [N, HV, C, C], 0 above the diagonal
    a: Tensor  # [N, HV, C, C], 0 on the diagonal too


def kda_value_gradients(
    problem: Problem, chunks: Chunks, scanned: Scanned, d_output: Tensor, d_scan: ScanGradients
) -> ValueGradients:
    """Run the kernel; d_output [B, T, HV, V] is contiguous."""
    p = problem
    gradients = ValueGradients(
        v=torch.empty_like(p.v),
        beta=p.empty(*p.v.shape[:3], dtype=torch.float32),
        reads=torch.empty_like(chunks.reads),
        a=torch.empty_like(chunks.reads),
    )
    p.launcher(kda_value_gradients_kernel, p.total_chunks, p.HV)(
        *(p.v, p.beta, d_output, chunks.kd, chunks.inverse),
        *(scanned.states, scanned.deltas, d_scan.deltas, p.cu_seqlens, p.chunk_offsets),
        *gradients,
        *(p.T, p.num_chunks, p.N, p.HV),
        V=p.V,
        C=p.C,
        BK=p.BK,
        BV=p.BV,
        BN=p.BN,
        TILE_K=TILE_K,
        TILE_V=min(TILE_V, p.BV),
        PACKED=p.packed,
        BETA_LOGITS=p.beta_logits,
        PRECISION=p.precision,
        num_warps=4,
        num_stages=1,
    )
    return gradients
