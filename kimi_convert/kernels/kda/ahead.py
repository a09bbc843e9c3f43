"""The Triton kernels of a first call, compiled side by side before any of them is launched.

Compiled as they are launched, one after another, they take the sum of their times; side by side, on
as many cores, the time of the slowest. What will be launched is not listed anywhere: the passes are
rehearsed on tensors without memory, where a launch only compiles. A kernel that the rehearsal did
not foresee compiles when it is launched, as it would without this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from kimi_convert.kernels.backend import launching_on
from kimi_convert.kernels.kda.chunks import empty_chunks
from kimi_convert.kernels.kda.device import INTERPRETED
from kimi_convert.kernels.kda.gradients import kda_key_gradients
from kimi_convert.kernels.kda.intra import kda_intra
from kimi_convert.kernels.kda.passes import run_backward, run_forward
from kimi_convert.kernels.kda.problem import Problem

_LOGGER = logging.getLogger(__name__)

# Triton before 3.5 compiles when it launches only.
_CAN_COMPILE_AHEAD = hasattr(triton, "AsyncCompileMode") and not INTERPRETED.value

# Kinds of calls whose kernels are compiled, as Triton's own cache of kernels for the process.
_compiled: set[tuple[object, ...]] = set()
_lock = Lock()


def compile_ahead(
    problem: Problem, state: Tensor | None, *, with_cuda: bool, with_gradients: bool
) -> None:
    """Compile what a call is going to launch, if none of its kind was made before.

    The gradient of the final state is taken to be 0: of its kernel, the form that takes one compiles
    when it is launched. The stages in CUDA C++ are compiled when they are called.

    Args:
        problem: what is going to run.
        state: [sequences, HV, K, V] fp32, or None.
        with_cuda: take the stages in CUDA C++.
        with_gradients: a backward pass will follow.
    """
    kind = _kind(problem, with_cuda, with_gradients, state is None)
    if kind in _compiled:
        return
    with _lock:
        if kind not in _compiled and _CAN_COMPILE_AHEAD:
            _compile(problem, state, with_cuda=with_cuda, with_gradients=with_gradients)
        _compiled.add(kind)


def _kind(p: Problem, *options: bool) -> tuple[object, ...]:
    """Return what Triton compiles a kernel anew for; sizes count as 1, multiples of 16, or others.

    Written out, not looped over: every call pays for it, 1 microsecond. Gate parameters in half
    precision, and tensors that do not start at 16 bytes, are too rare to be asked for.
    """
    T, N, chunks, total = p.T, p.N, p.num_chunks, p.total_chunks
    packed = p.cu_seqlens.dtype if p.cu_seqlens is not None else None
    return (
        *(options, p.v.get_device(), p.dtype, p.g.dtype, p.beta.dtype, p.H, p.HV, p.K, p.V, p.BN),
        *(packed, p.law, p.qk_norm, p.beta_logits, T == 1, T & 15 == 0, N == 1, N & 15 == 0),
        *(chunks == 1, chunks & 15 == 0, total == 1, total & 15 == 0),
    )


def _compile(
    problem: Problem, state: Tensor | None, *, with_cuda: bool, with_gradients: bool
) -> None:
    def run() -> None:
        bare = _without_memory(problem)
        bare_state = None if state is None else _meta(state)
        with _Workers(problem.v.device) as workers:
            mode = triton.AsyncCompileMode(workers)
            # What fails here is compiled again when it is launched, and fails there. Triton 3.5 does
            # not know this yet, and stops at the first failure.
            mode.ignore_errors = True
            with mode:
                _rehearse(bare, bare_state, with_cuda=with_cuda, with_gradients=with_gradients)

    try:
        # In a context of its own: Triton 3.6 leaves its mode on where a block ends with an exception.
        copy_context().run(run)
    except Exception as error:
        _LOGGER.warning("KDA kernels compile one after another: %s", error)


def _rehearse(
    problem: Problem, state: Tensor | None, *, with_cuda: bool, with_gradients: bool
) -> None:
    """Run the passes of a problem without memory."""
    intra = empty_chunks if with_cuda else kda_intra
    run_forward(problem, state, intra)
    if with_gradients:
        d_output = torch.empty_like(problem.v)
        behind = run_backward(problem, state, d_output, None, intra)
        if not with_cuda:
            kda_key_gradients(problem, *behind)


class _Workers(Executor):
    """Threads that compile a kernel and load it; all have ended when the block is left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(thread_name_prefix="compile-kda")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        """Start a compilation."""

        def make() -> object:
            kernel = fn(*args, **kwargs)
            # Triton 3.6 has the C compiler make a launcher for every kernel: a fifth of a second.
            with launching_on(self._device):
                _ = kernel.run
            return kernel

        return self._threads.submit(make)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


def _without_memory(problem: Problem) -> Problem:
    p = problem
    tensors = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens", "chunk_offsets")
    given = {name: getattr(p, name) for name in tensors}
    return replace(p, **{name: _meta(x) for name, x in given.items() if x is not None})


def _meta(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta")
