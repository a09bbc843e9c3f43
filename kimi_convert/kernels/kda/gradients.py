"""Gradients of a call's inputs, when both ways of the state are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_convert.kernels.kda.intra import Chunks
from kimi_convert.kernels.kda.key_gradients import kda_key_gradients_kernel
from kimi_convert.kernels.kda.problem import TILE_K, Problem
from kimi_convert.kernels.kda.scan import Scanned
from kimi_convert.kernels.kda.scan_backward import ScanGradients
from kimi_convert.kernels.kda.value_gradients import kda_value_gradients_kernel

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
