"""Chunked KDA on a GPU: lay a call out for the kernels, run the stages, join them to autograd.

Two of the stages exist in CUDA C++ as well as on Triton, and are faster there. Where they serve a
call, what was given goes into the kernels and its gradients come out of them. Elsewhere the unit
norms, the gate law and beta's sigmoid are fused without gradients, and torch's with them. Either way
the forward pass keeps its inputs alone, and the backward pass computes the stages again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.kda.ahead import compile_ahead
from kimi_convert.kernels.kda.arguments import Arguments
from kimi_convert.kernels.kda.cuda.choice import takes_cuda
from kimi_convert.kernels.kda.cuda.intra import kda_intra_cuda
from kimi_convert.kernels.kda.cuda.key_gradients import kda_key_gradients_cuda, serves_gradients
from kimi_convert.kernels.kda.device import BOUNDED, PRECOMPUTED, SOFTPLUS
from kimi_convert.kernels.kda.gate import Gate
from kimi_convert.kernels.kda.gradients import kda_key_gradients
from kimi_convert.kernels.kda.intra import kda_intra
from kimi_convert.kernels.kda.passes import run_backward, run_forward
from kimi_convert.kernels.kda.problem import Problem

# Tokens that are solved together. In fp32, 64 have up to 2.4 times the error of the recurrence
# where keys are alike, 32 up to 1.8 times; in half precision other roundings outweigh that.
CHUNK_SIZES = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}


def chunk_kda_gpu(call: Arguments, backend: Backend | None) -> tuple[Tensor, Tensor]:
    """Run a checked call with at least one token; see `chunk_kda`.

    Args:
        call: what is to run.
        backend: TRITON for all stages, CUDA for those that exist there, None for CUDA where it
            serves the call.

    Raises:
        KernelInputError: CUDA is asked for and does not serve the call.
    """
    if not call.needs_grad:
        problem = _problem(call)
        with_cuda = takes_cuda(problem, backend)
        state = _contiguous(call.initial_state)
        compile_ahead(problem, state, with_cuda=with_cuda, with_gradients=False)
        scanned = run_forward(problem, state, kda_intra_cuda if with_cuda else kda_intra)
        return scanned.output, scanned.final
    bare = replace(call, gate=None, qk_norm=False, beta_logits=False)
    problem = _problem(call)
    if takes_cuda(problem, backend) and serves_gradients(problem):
        parameters = (None, None) if call.gate is None else (call.gate.A_log, call.gate.dt_bias)
        tensors = (call.q, call.k, call.v, call.g, call.beta, *parameters, call.initial_state)
        return _FusedKda.apply(*tensors, call)
    q, k, g, beta = call.prepared()
    v = call.v
    tensors = (q.to(v.dtype), k.to(v.dtype), v, g, beta, call.initial_state)
    return _PreparedKda.apply(*tensors, bare)


class _FusedKda(torch.autograd.Function):
    """The kernels with their gradients, from what was given; needs the CUDA stages."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (autograd's)
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        call: Arguments,
    ) -> tuple[Tensor, Tensor]:
        """Run the two stages."""
        call = _with(call, q, k, v, g, beta, A_log, dt_bias, initial_state)
        problem = _problem(call)
        state = _contiguous(initial_state)
        compile_ahead(problem, state, with_cuda=True, with_gradients=True)
        scanned = run_forward(problem, state, kda_intra_cuda)
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, initial_state)
        ctx.call = replace(
            call, q=None, k=None, v=None, g=None, beta=None, initial_state=None, gate=None
        )
        ctx.lower_bound = None if call.gate is None else call.gate.lower_bound
        ctx.set_materialize_grads(False)
        return scanned.output, scanned.final

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable)
        ctx: Any,  # noqa: ANN401  (autograd's)
        *grad_outputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Run the stages again, then backwards."""
        d_output, d_final = grad_outputs
        call = _with(ctx.call, *ctx.saved_tensors, lower_bound=ctx.lower_bound)
        problem = _problem(call)
        state = _contiguous(call.initial_state)
        d_output, d_final = _like(d_output, problem.v), _contiguous(d_final)
        behind = run_backward(problem, state, d_output, d_final, kda_intra_cuda)
        d_inputs = kda_key_gradients_cuda(problem, *behind)
        return (
            d_inputs.q.to(call.q.dtype),
            d_inputs.k.to(call.k.dtype),
            behind.by_values.v,
            d_inputs.g,
            d_inputs.beta.to(call.beta.dtype),
            d_inputs.A_log,
            d_inputs.dt_bias,
            None if state is None else behind.d_scan.initial,
            None,
        )


class _PreparedKda(torch.autograd.Function):
    """The Triton kernels with their gradients; norms, gate law and sigmoid are torch's."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (autograd's)
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        call: Arguments,
    ) -> tuple[Tensor, Tensor]:
        """Run the two stages."""
        call = replace(call, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
        problem = _problem(call)
        state = _contiguous(initial_state)
        compile_ahead(problem, state, with_cuda=False, with_gradients=True)
        scanned = run_forward(problem, state, kda_intra)
        ctx.save_for_backward(q, k, v, g, beta, initial_state)
        ctx.call = replace(call, q=None, k=None, v=None, g=None, beta=None, initial_state=None)
        ctx.set_materialize_grads(False)
        return scanned.output, scanned.final

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable)
        ctx: Any,  # noqa: ANN401  (autograd's)
        *grad_outputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Run the stages again, then backwards."""
        d_output, d_final = grad_outputs
        names = ("q", "k", "v", "g", "beta", "initial_state")
        call = replace(ctx.call, **dict(zip(names, ctx.saved_tensors, strict=True)))
        problem = _problem(call)
        state = _contiguous(call.initial_state)
        d_output, d_final = _like(d_output, problem.v), _contiguous(d_final)
        behind = run_backward(problem, state, d_output, d_final, kda_intra)
        d_inputs = kda_key_gradients(problem, *behind)
        return (
            _of_shared_head(d_inputs.q, call.q),
            _of_shared_head(d_inputs.k, call.k),
            d_inputs.v,
            d_inputs.g.to(call.g.dtype),
            d_inputs.beta.to(call.beta.dtype),
            None if state is None else behind.d_scan.initial,
            None,
        )


def law_of(call: Arguments) -> int:
    """Return what the kernels call the gate law of a call."""
    if call.gate is None:
        return PRECOMPUTED.value
    return SOFTPLUS.value if call.gate.lower_bound is None else BOUNDED.value


def _with(
    call: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lower_bound: float | None = None,
) -> Arguments:
    """Return a call with these tensors; those of its gate may be missing."""
    gate = None
    if A_log is not None and dt_bias is not None:
        bound = lower_bound if call.gate is None else call.gate.lower_bound
        gate = Gate(A_log=A_log, dt_bias=dt_bias, lower_bound=bound)
    return replace(call, q=q, k=k, v=v, g=g, beta=beta, gate=gate, initial_state=initial_state)


def _problem(call: Arguments) -> Problem:
    gate = call.gate
    v, g, beta = (x.contiguous() for x in (call.v, call.g, call.beta))
    q, k = (x.to(v.dtype).contiguous() for x in (call.q, call.k))
    chunk_size = CHUNK_SIZES[v.dtype]
    return Problem(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=call.scale,
        A_log=None if gate is None else gate.A_log.contiguous(),
        dt_bias=None if gate is None else gate.dt_bias.contiguous(),
        law=law_of(call),
        lower_bound=call.lower_bound,
        qk_norm=call.qk_norm,
        beta_logits=call.beta_logits,
        cu_seqlens=call.cu_seqlens,
        chunk_offsets=_chunk_offsets(call.cu_seqlens, chunk_size),
        C=chunk_size,
    )


def _chunk_offsets(cu_seqlens: Tensor | None, chunk_size: int) -> Tensor | None:
    """Return the chunks before each sequence and of all, [N + 1] int32, without a wait."""
    if cu_seqlens is None:
        return None
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    offsets = torch.zeros_like(cu_seqlens, dtype=torch.int32)
    torch.cumsum((lengths + chunk_size - 1) // chunk_size, 0, out=offsets[1:])
    return offsets


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _like(d_output: Tensor | None, v: Tensor) -> Tensor:
    """Return the gradient of the output as the kernels take it; 0 if there is none."""
    return torch.zeros_like(v) if d_output is None else d_output.to(v.dtype).contiguous()


def _of_shared_head(gradient: Tensor, x: Tensor) -> Tensor:
    """Sum the gradients [B, T, HV, K] of the value heads that read one head of x [B, T, H, K]."""
    if gradient.shape == x.shape:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)
