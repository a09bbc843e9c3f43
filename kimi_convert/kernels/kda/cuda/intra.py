"""The stage `intra` in CUDA C++: bf16 keys of 128 channels, in chunks of 64 tokens."""

from __future__ import annotations

from kimi_convert.kernels.kda.chunks import Chunks, empty_chunks
from kimi_convert.kernels.kda.cuda.driver import Kernel
from kimi_convert.kernels.kda.cuda.stage import multiprocessors, pointers, stage_kernel
from kimi_convert.kernels.kda.device import BOUNDED
from kimi_convert.kernels.kda.problem import Problem

_PARAMETERS = "@17P6i2f"
_SHARED_BYTES = 53520
# Blocks of a multiprocessor: what shared memory leaves room for, and what steep chunks have the
# registers for.
_BLOCKS, _STEEP_BLOCKS = 4, 2
# Natural log decay per token down to which no chunk is steep: 16 tokens within 2^-120.
_GENTLE_BOUND = -5.19


def kda_intra_cuda(problem: Problem, *, for_gradients: bool = False) -> Chunks:
    """Run the stage for every chunk of a problem that `unserved` has nothing against."""
    p = problem
    chunks = empty_chunks(p, for_gradients=for_gradients)
    arguments = (
        *pointers(p.q, p.k, p.g, p.beta, p.A_log, p.dt_bias, p.cu_seqlens, p.chunk_offsets),
        *pointers(*chunks[:6], chunks.kd if for_gradients else None, chunks.inverse, chunks.steep),
        *(p.T, p.num_chunks, p.N, p.total_chunks, p.H, p.HV, p.scale, p.lower_bound),
    )
    kernel = _kernel(p, for_gradients=for_gradients, steep=False)
    device = p.v.device.index
    kernel.launch(device, (p.total_chunks, p.HV), arguments)
    if p.law != BOUNDED.value or p.lower_bound < _GENTLE_BOUND:
        blocks = min(p.total_chunks * p.HV, _STEEP_BLOCKS * multiprocessors(device))
        steep = _kernel(p, for_gradients=for_gradients, steep=True)
        steep.launch(device, (blocks, 1), arguments)
    return chunks


def _kernel(problem: Problem, *, for_gradients: bool, steep: bool) -> Kernel:
    return stage_kernel(
        problem,
        ("tiles.cuh", "intra.cu"),
        "kda_intra",
        parameters=_PARAMETERS,
        shared_bytes=_SHARED_BYTES,
        KEEP=int(for_gradients),
        STEEP=int(steep),
        BLOCKS=_STEEP_BLOCKS if steep else _BLOCKS,
    )
