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
    # Of one shape in one go: an allocation costs a short call as much as a tenth of a launch.
    w, qg, kg, *kd = p.empty(4 if for_gradients else 3, *grid, p.C, p.BK).unbind()
    reads, solve, *inverse = p.empty(3 if for_gradients else 2, *grid, p.C, p.C).unbind()
    return Chunks(
        w=w,
        qg=qg,
        kg=kg,
        reads=reads,
        solve=solve,
        decay=p.empty(*grid, p.BK, dtype=torch.float32),
        kd=kd[0] if kd else w,
        inverse=inverse[0] if inverse else None,
        steep=p.empty(*grid, dtype=torch.int32),
    )
