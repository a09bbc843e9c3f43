"""What the stage `intra` makes of every chunk, for the stages after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_convert.kernels.kda.problem import Problem


class Chunks(NamedTuple):
    """N chunks of all sequences, HV heads, K padded to a power of two; docs/kernels/kda.md."""

    w: Tensor  # [N, HV, C, K], solve exp(G) k
    qg: Tensor  # [N, HV, C, K], scale exp(G) q
    kg: Tensor  # [N, HV, C, K], exp(G_C - G) k
    reads: Tensor  # [N, HV, C, C], scale q_i . exp(G_i - G_j) k_j
    solve: Tensor  # [N, HV, C, C], (I + A)^-1 diag(beta)
    decay: Tensor  # [N, HV, K] fp32, exp(G_C)
    kd: Tensor  # [N, HV, C, K], exp(G) k, for the gradients; else w
    inverse: Tensor | None  # [N, HV, C, C], (I + A)^-1, for the gradients
    steep: Tensor  # [N, HV] int32: gates carried a factor out of the fast path's range


def empty_chunks(problem: Problem, *, for_gradients: bool) -> Chunks:
    """Allocate what the stage writes."""
    p = problem
    grid = (p.total_chunks, p.HV)
    w = p.empty(*grid, p.C, p.BK)
    return Chunks(
        w=w,
        qg=p.empty(*grid, p.C, p.BK),
        kg=p.empty(*grid, p.C, p.BK),
        reads=p.empty(*grid, p.C, p.C),
        solve=p.empty(*grid, p.C, p.C),
        decay=p.empty(*grid, p.BK, dtype=torch.float32),
        kd=torch.empty_like(w) if for_gradients else w,
        inverse=p.empty(*grid, p.C, p.C) if for_gradients else None,
        steep=p.empty(*grid, dtype=torch.int32),
    )
