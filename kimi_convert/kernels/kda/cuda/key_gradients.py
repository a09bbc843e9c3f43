"""The stage `key_gradients` in CUDA C++, down to what the caller gave; bf16 heads of 128 channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_convert.kernels.kda.cuda.stage import WIDTH, multiprocessors, pointers, stage_kernel
from kimi_convert.kernels.kda.device import BOUNDED, PRECOMPUTED
from kimi_convert.kernels.kda.problem import Problem
from kimi_convert.kernels.kda.scan import Scanned
from kimi_convert.kernels.kda.scan_backward import ScanGradients
from kimi_convert.kernels.kda.value_gradients import ValueGradients

_PARAMETERS = "@23P5i2f"
_SHARED_BYTES, _STEEP_SHARED_BYTES = 115072, 184096
# As in intra.py: 16 tokens within 2^-117.
_GENTLE_BOUND = -5.06


class InputGradients(NamedTuple):
    """Of q, k, g and beta as they were given, and of the gate's parameters."""

    q: Tensor  # [B, T, H, 128] bf16
    k: Tensor  # [B, T, H, 128] bf16
    g: Tensor  # [B, T, H, 128], as g
    beta: Tensor  # [B, T, H] fp32
    A_log: Tensor | None  # [H] fp32
    dt_bias: Tensor | None  # [H, 128] fp32


def serves_gradients(problem: Problem) -> bool:
    """Say whether the kernels serve a problem that `unserved` has nothing against."""
    return problem.H == problem.HV and problem.V == WIDTH


def kda_key_gradients_cuda(
    problem: Problem,
    scanned: Scanned,
    d_output: Tensor,
    d_scan: ScanGradients,
    by_values: ValueGradients,
) -> InputGradients:
    """Run the stage; d_output [B, T, H, 128] is bf16 and contiguous."""
    p = problem
    grid = (p.total_chunks, p.H)
    has_law = p.law != PRECOMPUTED.value
    d_rate = p.empty(*grid, dtype=torch.float32) if has_law else None
    d_bias = p.empty(*grid, WIDTH, dtype=torch.float32) if has_law else None
    steep = p.empty(*grid, dtype=torch.int32)
    gradients = (
        torch.empty_like(p.q),
        torch.empty_like(p.k),
        torch.empty_like(p.g),
        torch.empty_like(by_values.beta),
    )
    arguments = (
        *pointers(p.q, p.k, p.g, p.beta, p.A_log, p.dt_bias, p.cu_seqlens, p.chunk_offsets),
        *pointers(d_output, by_values.v, by_values.reads, by_values.a),
        *pointers(scanned.states, scanned.deltas, d_scan.states),
        *pointers(*gradients[:3], by_values.beta, gradients[3], d_rate, d_bias, steep),
        *(p.T, p.num_chunks, p.N, p.total_chunks, p.H, p.scale, p.lower_bound),
    )
    _launch(p, "key_gradients.cu", _SHARED_BYTES, grid, arguments)
    if p.law != BOUNDED.value or p.lower_bound < _GENTLE_BOUND:
        blocks = min(p.total_chunks * p.H, multiprocessors(p.v.device.index))
        _launch(p, "key_gradients_steep.cu", _STEEP_SHARED_BYTES, (blocks, 1), arguments)
    return InputGradients(
        *gradients,
        A_log=None if d_rate is None else d_rate.sum(0),
        dt_bias=None if d_bias is None else d_bias.sum(0),
    )


def _launch(
    problem: Problem,
    source: str,
    shared_bytes: int,
    grid: tuple[int, int],
    arguments: tuple[int | float, ...],
) -> None:
    kernel = stage_kernel(
        problem,
        ("tiles.cuh", "gradients.cuh", source),
        "kda_key_gradients",
        parameters=_PARAMETERS,
        shared_bytes=shared_bytes,
    )
    kernel.launch(problem.v.device.index, grid, arguments)
