"""The stages of a forward and of a backward pass, in their order.

Both ways of `chunk_gpu` and the rehearsal of `ahead` run them, so that a rehearsal cannot miss one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kimi_convert.kernels.kda.chunks import Chunks
from kimi_convert.kernels.kda.problem import Problem
from kimi_convert.kernels.kda.scan import Scanned, kda_scan
from kimi_convert.kernels.kda.scan_backward import ScanGradients, kda_scan_backward
from kimi_convert.kernels.kda.value_gradients import ValueGradients, kda_value_gradients

Intra = Callable[..., Chunks]  # (problem, *, for_gradients), on Triton or in CUDA C++


class BackwardPass(NamedTuple):
    """What the stages before `key_gradients` give it."""

    scanned: Scanned
    d_output: Tensor  # [B, T, HV, V]
    d_scan: ScanGradients
    by_values: ValueGradients


def run_forward(problem: Problem, state: Tensor | None, intra: Intra) -> Scanned:
    """Run both stages; state [sequences, HV, K, V] fp32 may be missing for 0."""
    return kda_scan(problem, intra(problem, for_gradients=False), state)


def run_backward(
    problem: Problem, state: Tensor | None, d_output: Tensor, d_final: Tensor | None, intra: Intra
) -> BackwardPass:
    """Run the stages again, then backwards, down to the values.

    Args:
        problem: as in the forward pass.
        state: likewise.
        d_output: [B, T, HV, V], of the output, in v's dtype and contiguous.
        d_final: [sequences, HV, K, V] fp32, of the final state, or None for 0.
        intra: the stage.
    """
    chunks = intra(problem, for_gradients=True)
    scanned = kda_scan(problem, chunks, state, for_gradients=True)
    d_scan = kda_scan_backward(problem, chunks, d_output, d_final)
    by_values = kda_value_gradients(problem, chunks, scanned, d_output, d_scan)
    return BackwardPass(scanned, d_output, d_scan, by_values)
