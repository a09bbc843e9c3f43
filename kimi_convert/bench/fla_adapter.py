"""Our KDA behind the signatures of flash-linear-attention, and its recurrence in fp64 behind them.

Both take what `fla.ops.kda` takes: an output state only if it is asked for, states as [K, V] or
[V, K], A_log with any number of dims of size 1, dt_bias flat, either of them left out, a gate that
is clamped by its law where `lower_bound` is given. What concerns its kernels alone is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.kda import Gate, chunk_kda, recurrent_kda
from kimi_convert.kernels.kda.reference import recurrent_kda_reference
from kimi_convert.kernels.norm import l2_norm

Results = tuple[Tensor, Tensor | None]

_SEGMENT_TOKENS = 64  # whose states the oracle's backward pass holds at once


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaOptions:
    """The keywords of `chunk_kda` and `fused_recurrent_kda` of flash-linear-attention that we serve."""

    scale: float | None = None
    initial_state: Tensor | None = None  # [N, HV, K, V], [N, HV, V, K] where state_v_first
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False  # beta in (0, 2); with use_beta_sigmoid_in_kernel alone
    lower_bound: float | None = None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    state_v_first: bool = False
    cu_seqlens: Tensor | None = None


class KdaFunction(Protocol):
    """One implementation."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: FlaOptions
    ) -> Results:
        """Return the output [B, T, HV, V], and the final state if it is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """`chunk_kda` or `recurrent_kda`."""

    recurrent: bool
    backend: Backend | None  # None lets the call decide

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: FlaOptions
    ) -> Results:
        """See `KdaFunction`."""
        form = recurrent_kda if self.recurrent else chunk_kda
        # 2 sigmoid(beta) is no option of ours: it is done before.
        doubled = options.use_beta_sigmoid_in_kernel and options.allow_neg_eigval
        output, state = form(
            *(q, k, v, g),
            2 * beta.float().sigmoid() if doubled else beta,
            scale=options.scale,
            initial_state=_turned(options.initial_state, options),
            gate=gate_of(options, g) if options.use_gate_in_kernel else None,
            qk_norm=options.use_qk_l2norm_in_kernel,
            beta_logits=options.use_beta_sigmoid_in_kernel and not doubled,
            cu_seqlens=options.cu_seqlens,
            backend=self.backend,
        )
        return output, _turned(state, options) if options.output_final_state else None


def oracle(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: FlaOptions
) -> Results:
    """Run the recurrence in fp64 on exactly these values; see `KdaFunction`."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    if options.use_qk_l2norm_in_kernel:
        q, k = l2_norm(q), l2_norm(k)
    if options.use_gate_in_kernel:
        g = gate_of(options, g).log_decay(g)
    if options.use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if options.allow_neg_eigval else 1)
    group = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    bounds = None if options.cu_seqlens is None else options.cu_seqlens.tolist()
    state = _turned(options.initial_state, options)
    if state is None:
        N = len(q) if bounds is None else len(bounds) - 1
        state = v.new_zeros(N, v.shape[2], q.shape[3], v.shape[3])
    state = state.double()
    inputs = (q, k, v, g, beta)
    if bounds is None:
        output, state = _recurrence(inputs, state, scale)
    else:
        results = [
            _recurrence(tuple(x[:, start:stop] for x in inputs), state[n : n + 1], scale)
            for n, (start, stop) in enumerate(pairwise(bounds))
        ]
        output = torch.cat([output for output, _ in results], 1)
        state = torch.cat([state for _, state in results])
    return output, _turned(state, options) if options.output_final_state else None


def gate_of(options: FlaOptions, g: Tensor) -> Gate:
    """Return the law of a call; what it leaves out is zeros, in the dtype that is computed in."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    A_log, dt_bias = options.A_log, options.dt_bias
    A_log = g.new_zeros(g.shape[2], dtype=dtype) if A_log is None else A_log.flatten().to(dtype)
    if dt_bias is None:
        return Gate(
            A_log=A_log,
            dt_bias=g.new_zeros(g.shape[2:], dtype=dtype),
            lower_bound=options.lower_bound,
        )
    return Gate(
        A_log=A_log,
        dt_bias=dt_bias.view(g.shape[2:]).to(dtype),
        lower_bound=options.lower_bound,
    )


def _recurrence(inputs: tuple[Tensor, ...], state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run tokens one after another; a backward pass computes the states of a segment again."""
    outputs: list[Tensor] = []
    for parts in zip(*(x.split(_SEGMENT_TOKENS, 1) for x in inputs), strict=True):
        if parts[0].shape[1] == 0:
            outputs.append(parts[2])
            continue
        output, state = checkpoint(
            recurrent_kda_reference, *parts, scale=scale, state=state, use_reentrant=False
        )
        outputs.append(output)
    return torch.cat(outputs, 1), state


def _turned(state: Tensor | None, options: FlaOptions) -> Tensor | None:
    """Return a state of FLA's layout in ours, or the other way round."""
    return state.mT if state is not None and options.state_v_first else state
