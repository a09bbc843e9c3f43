"""The way of the state's gradient, from the last chunk of a sequence to the first.

With do the gradient of the output and dS that of the state after a chunk, per chunk and, as in
`scan`, transposed:

    ddelta^T = do^T reads + dS^T kg^T
    dS^T     = dS^T diag(decay) + do^T qg - ddelta^T w
"""

# pyright: reportPossiblyUnboundVariable=false
# Kernels ask ALIGNED twice; it is settled when they are compiled.
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.kda.chunks import Chunks
from kimi_convert.kernels.kda.device import locate_sequence
from kimi_convert.kernels.kda.problem import Problem, allow_descriptors
from kimi_convert.kernels.kda.scan import scan_registers, scan_tiles


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
    total_chunks,
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
    ALIGNED: tl.constexpr,  # as in `scan`
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run TILE_V value channels of one head of one sequence; ids are (sequence * HV + head, tile)."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    i_h = (i_nh % HV).to(tl.int32)
    DTYPE: tl.constexpr = qg.dtype.element_ty
    start, tokens, first_chunk, num_chunks = locate_sequence(
        i_nh // HV, cu_seqlens, chunk_offsets, length, num_chunks, PACKED
    )
    rows = total_chunks * HV * C
    w_tiles = tl.make_tensor_descriptor(w, [rows, BK], [BK, 1], [C, BK])
    qg_tiles = tl.make_tensor_descriptor(qg, [rows, BK], [BK, 1], [C, BK])
    kg_tiles = tl.make_tensor_descriptor(kg, [rows, BK], [BK, 1], [C, BK])
    reads_tiles = tl.make_tensor_descriptor(reads, [rows, C], [C, 1], [C, C])
    d_o += start * HV * V
    if ALIGNED:
        d_o_tiles = tl.make_tensor_descriptor(
            d_o, [tl.maximum(tokens, 1), HV * V], [HV * V, 1], [C, TILE_V]
        )
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
        row = (i_ch * C).to(tl.int32)
        if ALIGNED:
            b_do = d_o_tiles.load([i_c * C, i_h * V + i_v * TILE_V])
        else:
            p_tv = ((i_c * C + i)[:, None] * HV + i_h) * V + o_v[None, :]
            m_tv = (i_c * C + i < tokens)[:, None] & (o_v < V)[None, :]
            b_do = tl.load(d_o + p_tv, mask=m_tv, other=0)
        b_do = tl.trans(b_do.to(DTYPE))
        b_reads = reads_tiles.load([row, 0])
        b_kg = kg_tiles.load([row, 0])
        b_qg = qg_tiles.load([row, 0])
        b_w = w_tiles.load([row, 0])
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
    allow_descriptors()
    p.launcher(kda_scan_backward_kernel, p.N * p.HV, p.BV // tile_v)(
        *(chunks.w, chunks.qg, chunks.kg, chunks.reads, chunks.decay),
        *(d_output, d_final, p.cu_seqlens, p.chunk_offsets),
        *gradients,
        *(p.T, p.num_chunks, p.total_chunks, p.HV),
        K=p.K,
        V=p.V,
        C=p.C,
        BK=p.BK,
        BV=p.BV,
        TILE_V=tile_v,
        PACKED=p.packed,
        HAS_FINAL=d_final is not None,
        ALIGNED=p.aligned(d_output, tile_v),
        PRECISION=p.precision,
        STAGES=stages,
        num_warps=4,
        **scan_registers(p),
    )
    return gradients
