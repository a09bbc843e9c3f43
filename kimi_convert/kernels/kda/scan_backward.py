"""The way of the state's gradient, from the last chunk of a sequence to the first.

With do the gradient of the output and dS that of the state after a chunk, per chunk and, as in
`scan`, transposed:

    ddelta^T = do^T reads + dS^T kg^T
    dS^T     = dS^T diag(decay) + do^T qg - ddelta^T w
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.kda.intra import Chunks
from kimi_convert.kernels.kda.problem import Problem
from kimi_convert.kernels.kda.scan import scan_tiles


class ScanGradients(NamedTuple):
    """What the gradient's way gives."""

    initial: Tensor  # [sequences, HV, K, V] fp32, of the state before the first chunk
    states: Tensor  # [N, HV, V, K], of the state after each chunk
    deltas: Tensor  # [N, HV, V, C]


@triton.jit
def kda_scan_backward_kernel(
    # inputs
    w,  # [N, HV, C, BK], N chunks
    qg,  # [N, HV, C, BK]
    kg,  # [N, HV, C, BK]
    reads,  # [N, HV, C, C]
    decay,  # [N, HV, BK]
    d_o,  # [T, HV, V]
    d_final,  # [sequences, HV, K, V], where HAS_FINAL
    cu_seqlens,
    chunk_offsets,
    # outputs
    d_initial,  # [sequences, HV, K, V]
    d_states,  # [N, HV, BV, BK]
    d_deltas,  # [N, HV, BV, C]
    # sizes
    length,
    num_chunks,
    HV,
    # meta
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILE_V: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run TILE_V value channels of one head of one sequence; ids are (sequence * HV + head, tile)."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    i_n = i_nh // HV
    i_h = i_nh % HV
    DTYPE: tl.constexpr = qg.dtype.element_ty
    if PACKED:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        stop = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        first_chunk = tl.load(chunk_offsets + i_n).to(tl.int64)
        num_chunks = tl.load(chunk_offsets + i_n + 1) - tl.load(chunk_offsets + i_n)
    else:
        start = i_n * length
        stop = start + length
        first_chunk = i_n * num_chunks
    i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * TILE_V + tl.arange(0, TILE_V)
    p_state = i_nh * K * V + o_k[None, :] * V + o_v[:, None]
    m_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    d_state = tl.zeros([TILE_V, BK], tl.float32)
    if HAS_FINAL:
        d_state = tl.load(d_final + p_state, mask=m_state, other=0).to(tl.float32)

    for i_step in tl.range(0, num_chunks, num_stages=STAGES):
        i_c = num_chunks - 1 - i_step
        i_ch = (first_chunk + i_c) * HV + i_h
        p_ck = i_ch * C * BK + i[:, None] * BK + o_k[None, :]
        p_cc = i_ch * C * C + i[:, None] * C + i[None, :]
        o_t = start + i_c * C + i
        p_tv = (o_t[:, None] * HV + i_h) * V + o_v[None, :]
        m_tv = (o_t < stop)[:, None] & (o_v < V)[None, :]
        b_do = tl.trans(tl.load(d_o + p_tv, mask=m_tv, other=0).to(DTYPE))
        b_reads = tl.load(reads + p_cc)
        b_kg = tl.load(kg + p_ck)
        b_qg = tl.load(qg + p_ck)
        b_w = tl.load(w + p_ck)
        b_decay = tl.load(decay + i_ch * BK + o_k)

        b_dstate = d_state.to(DTYPE)
        tl.store(d_states + (i_ch * BV + o_v[:, None]) * BK + o_k[None, :], b_dstate)
        d_delta = tl.dot(b_do, b_reads, input_precision=PRECISION)
        d_delta = tl.dot(b_dstate, tl.trans(b_kg), acc=d_delta, input_precision=PRECISION)
        b_ddelta = d_delta.to(DTYPE)
        tl.store(d_deltas + (i_ch * BV + o_v[:, None]) * C + i[None, :], b_ddelta)
        d_state = tl.dot(b_do, b_qg, acc=d_state * b_decay[None, :], input_precision=PRECISION)
        d_state = tl.dot(-b_ddelta, b_w, acc=d_state, input_precision=PRECISION)
    tl.store(d_initial + p_state, d_state, mask=m_state)


def kda_scan_backward(
    problem: Problem, chunks: Chunks, d_output: Tensor, d_final: Tensor | None
) -> ScanGradients:
    """Run all sequences backwards; d_final [sequences, HV, K, V] may be missing for 0."""
    p = problem
    grid = (p.total_chunks, p.HV)
    gradients = ScanGradients(
        initial=p.empty(p.N, p.HV, p.K, p.V, dtype=torch.float32),
        states=p.empty(*grid, p.BV, p.BK),
        deltas=p.empty(*grid, p.BV, p.C),
    )
    tile_v, stages = scan_tiles(p)
    kda_scan_backward_kernel[(p.N * p.HV, p.BV // tile_v)](
        *(chunks.w, chunks.qg, chunks.kg, chunks.reads, chunks.decay),
        *(d_output, d_final, p.cu_seqlens, p.chunk_offsets),
        *gradients,
        *(p.T, p.num_chunks, p.HV),
        K=p.K,
        V=p.V,
        C=p.C,
        BK=p.BK,
        BV=p.BV,
        TILE_V=tile_v,
        PACKED=p.packed,
        HAS_FINAL=d_final is not None,
        PRECISION=p.precision,
        STAGES=stages,
        num_warps=4,
    )
    return gradients
