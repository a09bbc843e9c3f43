"""Chunked KDA on Triton: lay the call out for the kernels, run the two stages."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_convert.kernels.kda.arguments import Arguments
from kimi_convert.kernels.kda.device import BOUNDED, PRECOMPUTED, SOFTPLUS
from kimi_convert.kernels.kda.intra import kda_intra
from kimi_convert.kernels.kda.problem import Problem
from kimi_convert.kernels.kda.scan import kda_scan

# Tokens that are solved together. In fp32, 64 have up to 2.4 times the error of the recurrence
# where keys are alike, 32 up to 1.8 times; in half precision other roundings outweigh that.
CHUNK_SIZES = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}


def chunk_kda_triton(call: Arguments) -> tuple[Tensor, Tensor]:
    """Run a checked call with at least one token; see `chunk_kda`."""
    problem = _problem(call)
    state = call.initial_state
    return kda_scan(problem, kda_intra(problem), None if state is None else state.contiguous())


def _problem(call: Arguments) -> Problem:
    gate = call.gate
    chunk_size = CHUNK_SIZES[call.v.dtype]
    q, k, v, g, beta = (x.contiguous() for x in (call.q, call.k, call.v, call.g, call.beta))
    return Problem(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=call.scale,
        A_log=None if gate is None else gate.A_log.contiguous(),
        dt_bias=None if gate is None else gate.dt_bias.contiguous(),
        law=_law(call),
        lower_bound=0.0 if gate is None or gate.lower_bound is None else gate.lower_bound,
        qk_norm=call.qk_norm,
        beta_logits=call.beta_logits,
        cu_seqlens=call.cu_seqlens,
        chunk_offsets=_chunk_offsets(call.cu_seqlens, chunk_size),
        C=chunk_size,
    )


def _law(call: Arguments) -> int:
    if call.gate is None:
        return PRECOMPUTED.value
    return SOFTPLUS.value if call.gate.lower_bound is None else BOUNDED.value


def _chunk_offsets(cu_seqlens: Tensor | None, chunk_size: int) -> Tensor | None:
    """Return the chunks before each sequence and of all, [N + 1] int32, without a wait."""
    if cu_seqlens is None:
        return None
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    offsets = torch.zeros_like(cu_seqlens, dtype=torch.int32)
    torch.cumsum((lengths + chunk_size - 1) // chunk_size, 0, out=offsets[1:])
    return offsets
