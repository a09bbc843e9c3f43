"""The stage `key_gradients` on Triton, which gives the gradients of prepared inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_convert.kernels.kda.key_gradients import kda_key_gradients_kernel
from kimi_convert.kernels.kda.problem import TILE_K, TILE_V, Problem
from kimi_convert.kernels.kda.scan import Scanned
from kimi_convert.kernels.kda.scan_backward import ScanGradients
from kimi_convert.kernels.kda.value_gradients import ValueGradients

# As in `intra`, but one factor alone multiplies a sum of gradients before the other does: half the
# range is left to them.
FACTOR_LIMITS = {torch.bfloat16: 60.0, torch.float16: 3.0, torch.float32: 4.0}


class Gradients(NamedTuple):
    """Of the inputs; those of q and k for every value head."""

    q: Tensor  # [B, T, HV, K]
    k: Tensor  # [B, T, HV, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K] fp32
    beta: Tensor  # [B, T, HV] fp32


def kda_key_gradients(
    problem: Problem,
    scanned: Scanned,
    d_output: Tensor,
    d_scan: ScanGradients,
    by_values: ValueGradients,
) -> Gradients:
    """Run the kernel; d_output [B, T, HV, V] is contiguous."""
    p = problem
    # Heads that share a query and a key: their gradients are summed, so not rounded before.
    dtype = p.q.dtype if p.H == p.HV else torch.float32
    shape = p.v.shape[:3]
    gradients = Gradients(
        q=p.empty(*shape, p.K, dtype=dtype),
        k=p.empty(*shape, p.K, dtype=dtype),
        v=by_values.v,
        g=p.empty(*shape, p.K, dtype=torch.float32),
        beta=by_values.beta,
    )
    p.launcher(kda_key_gradients_kernel, p.total_chunks, p.HV)(
        *(p.q, p.k, p.g, p.beta, d_output, by_values.v, by_values.reads, by_values.a),
        *(scanned.states, scanned.deltas, d_scan.states, p.cu_seqlens, p.chunk_offsets),
        *(gradients.q, gradients.k, gradients.g, gradients.beta),
        *(p.T, p.num_chunks, p.N, p.H, p.HV, p.scale),
        K=p.K,
        V=p.V,
        C=p.C,
        LOG_C=p.C.bit_length() - 1,
        BK=p.BK,
        BV=p.BV,
        BN=p.BN,
        TILE_K=TILE_K,
        TILE_V=min(TILE_V, p.BV),
        PACKED=p.packed,
        FACTOR_LIMIT=FACTOR_LIMITS[p.dtype],
        PRECISION=p.precision,
        num_warps=4,
        num_stages=1,
    )
    return gradients
