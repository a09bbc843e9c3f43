"""The state's way through the chunks of a sequence, and the outputs read on it.

Per chunk, with what `intra` has made (all of it transposed here, so that the left operand of
every product is a result of the one before, and stays in registers):

    delta^T = v^T solve^T - S^T w^T
    o^T     = S^T qg^T + delta^T reads^T
    S^T     = S^T diag(decay) + delta^T kg
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


@triton.jit
def kda_scan_kernel(
    # inputs
    w,  # [N, HV, C, BK], N chunks
    qg,  # [N, HV, C, BK]
    kg,  # [N, HV, C, BK]
    reads,  # [N, HV, C, C]
    solve,  # [N, HV, C, C]
    decay,  # [N, HV, BK]
    v,  # [T, HV, V]
    initial,  # [sequences, HV, K, V], where HAS_INITIAL
    cu_seqlens,
    chunk_offsets,
    # outputs
    o,  # [T, HV, V]
    final,  # [sequences, HV, K, V]
    states,  # [N, HV, BV, BK], each chunk's first state transposed; None where not asked for
    deltas,  # [N, HV, BV, C], transposed likewise
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
    HAS_INITIAL: tl.constexpr,
    ALIGNED: tl.constexpr,  # tiles of v hold whole heads, and rows start at 16 bytes
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run TILE_V value channels of one head of one sequence; ids are (sequence * HV + head, tile).

    Tiles come through descriptors, which a GPU's copy engine reads two chunks ahead; rows past the
    end of a sequence are 0 and not written. All tensors contiguous.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    i_h = (i_nh % HV).to(tl.int32)
    DTYPE: tl.constexpr = v.dtype.element_ty
    start, tokens, first_chunk, num_chunks = locate_sequence(
        i_nh // HV, cu_seqlens, chunk_offsets, length, num_chunks, PACKED
    )
    rows = total_chunks * HV * C
    w_tiles = tl.make_tensor_descriptor(w, [rows, BK], [BK, 1], [C, BK])
    qg_tiles = tl.make_tensor_descriptor(qg, [rows, BK], [BK, 1], [C, BK])
    kg_tiles = tl.make_tensor_descriptor(kg, [rows, BK], [BK, 1], [C, BK])
    reads_tiles = tl.make_tensor_descriptor(reads, [rows, C], [C, 1], [C, C])
    solve_tiles = tl.make_tensor_descriptor(solve, [rows, C], [C, 1], [C, C])
    v += start * HV * V
    o += start * HV * V
    if ALIGNED:
        present = tl.maximum(tokens, 1)
        v_tiles = tl.make_tensor_descriptor(v, [present, HV * V], [HV * V, 1], [C, TILE_V])
        o_tiles = tl.make_tensor_descriptor(o, [present, HV * V], [HV * V, 1], [C, TILE_V])
    i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * TILE_V + tl.arange(0, TILE_V)
    p_state = i_nh * K * V + o_k[None, :] * V + o_v[:, None]
    m_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    state = tl.zeros([TILE_V, BK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + p_state, mask=m_state, other=0).to(tl.float32)

    i_ch = (first_chunk * HV + i_h).to(tl.int64)
    # The decay is no operand of a product, so it is fetched a chunk ahead by hand.
    next_decay = tl.load(decay + i_ch * BK + o_k)
    for i_c in tl.range(0, num_chunks, num_stages=STAGES):
        row = (i_ch * C).to(tl.int32)
        b_decay = next_decay
        i_kept = i_ch
        i_ch += HV
        more = i_c + 1 < num_chunks
        next_decay = tl.load(decay + i_ch * BK + o_k, mask=o_k < tl.where(more, BK, 0), other=0)
        p_tv = ((i_c * C + i)[:, None] * HV + i_h) * V + o_v[None, :]
        m_tv = (i_c * C + i < tokens)[:, None] & (o_v < V)[None, :]
        if ALIGNED:
            b_v = v_tiles.load([i_c * C, i_h * V + i_v * TILE_V])
        else:
            b_v = tl.load(v + p_tv, mask=m_tv, other=0)
        b_solve = solve_tiles.load([row, 0])
        b_w = w_tiles.load([row, 0])
        b_qg = qg_tiles.load([row, 0])
        b_kg = kg_tiles.load([row, 0])
        b_reads = reads_tiles.load([row, 0])

        b_state = state.to(DTYPE)
        delta = tl.dot(tl.trans(b_v), tl.trans(b_solve), input_precision=PRECISION)
        delta = tl.dot(-b_state, tl.trans(b_w), acc=delta, input_precision="tf32x3")
        read = tl.dot(b_state, tl.trans(b_qg), input_precision="tf32x3")
        b_delta = delta.to(DTYPE)
        if states is not None:
            tl.store(states + (i_kept * BV + o_v[:, None]) * BK + o_k[None, :], b_state)
            tl.store(deltas + (i_kept * BV + o_v[:, None]) * C + i[None, :], b_delta)
        state = tl.dot(b_delta, b_kg, acc=state * b_decay[None, :], input_precision=PRECISION)
        read = tl.dot(b_delta, tl.trans(b_reads), acc=read, input_precision=PRECISION)
        b_o = tl.trans(read).to(o.dtype.element_ty)
        if ALIGNED:
            o_tiles.store([i_c * C, i_h * V + i_v * TILE_V], b_o)
        else:
            tl.store(o + p_tv, b_o, mask=m_tv)
    tl.store(final + p_state, state, mask=m_state)


class Scanned(NamedTuple):
    """What the state's way gives."""

    output: Tensor  # [B, T, HV, V]
    final: Tensor  # [sequences, HV, K, V] fp32
    states: Tensor | None  # [N, HV, V, K], before each chunk, for the gradients
    deltas: Tensor | None  # [N, HV, V, C]


def kda_scan(
    problem: Problem, chunks: Chunks, initial_state: Tensor | None, *, for_gradients: bool = False
) -> Scanned:
    """Run all sequences."""
    p = problem
    grid = (p.total_chunks, p.HV)
    scanned = Scanned(
        output=torch.empty_like(p.v),
        final=p.empty(p.N, p.HV, p.K, p.V, dtype=torch.float32),
        states=p.empty(*grid, p.BV, p.BK) if for_gradients else None,
        deltas=p.empty(*grid, p.BV, p.C) if for_gradients else None,
    )
    tile_v, stages = scan_tiles(p)
    allow_descriptors()
    p.launcher(kda_scan_kernel, p.N * p.HV, p.BV // tile_v)(
        *(chunks.w, chunks.qg, chunks.kg, chunks.reads, chunks.solve, chunks.decay),
        *(p.v, initial_state, p.cu_seqlens, p.chunk_offsets),
        *scanned,
        *(p.T, p.num_chunks, p.total_chunks, p.HV),
        K=p.K,
        V=p.V,
        C=p.C,
        BK=p.BK,
        BV=p.BV,
        TILE_V=tile_v,
        PACKED=p.packed,
        HAS_INITIAL=initial_state is not None,
        # With what is kept for gradients, three chunks of v too would not fit into shared memory.
        ALIGNED=p.aligned(p.v, tile_v) and not for_gradients,
        PRECISION=_precision(p),
        STAGES=stages,
        num_warps=4,
        **scan_registers(p),
    )
    return scanned


def _precision(problem: Problem) -> str:
    """Return how fp32 tiles of C by C tokens, and the keys' way into the state, are multiplied.

    Reads of the state add up K products, whose roundings even out; they are always in tf32x3. For
    keys wider than 128 the assembler takes 25 s for the rest in bf16x6, and 4 s in tf32x3.
    """
    return problem.precision if problem.BK <= 128 else "tf32x3"


def scan_tiles(problem: Problem) -> tuple[int, int]:
    """Return the value channels of a program, and the chunks that it fetches ahead.

    The state of a tile is in registers, the operands of the chunks are in shared memory. T=8192
    H=32 D=128 bf16 on an H200, ms for 1, 2 and 3 chunks: 64 channels 0.740, 0.322, 0.189. Without
    the copy engine: 64 channels 0.511, 0.317, 0.251; 32 channels 0.321 for 3; 128 channels (8
    warps) 0.403 for 2.
    """
    half = problem.dtype.itemsize == 2
    if problem.BK > 128:
        return min(32, problem.BV), 1
    return min(64 if half else 32, problem.BV), 3 if half else 2


def scan_registers(problem: Problem) -> dict[str, int]:
    """Return how many registers of a thread the assembler may take, where it is told.

    In fp32, where all 255 are not enough, ptxas 12.8 and 12.9 take 32 on their own: they spill 22 to
    24 KB with keys of 128 channels and 35 to 37 KB with 256, told of 255 they spill 7 and 11 KB. How
    much faster that is has not been measured yet. AMD's compiler does not know the option.
    """
    told = problem.dtype == torch.float32 and torch.version.hip is None
    return {"maxnreg": 255} if told else {}
