"""The public KDA functions: check the arguments, choose the backend, run one of the forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.backend import Backend, launching_on, resolve_backend
from kimi_convert.kernels.kda.arguments import Arguments, Options, check_arguments
from kimi_convert.kernels.kda.chunk import CHUNK_SIZE, chunk_kda_forward
from kimi_convert.kernels.kda.gate import Gate
from kimi_convert.kernels.kda.reference import recurrent_kda_reference

MAX_CHUNK_SIZE = 256  # the triangular matrices of a chunk take chunk_size values per token
_TRITON_WIDTHS = 256  # of a key or a value: what fits into a multiprocessor

_Form = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, Tensor]]


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    gate: Gate | None = None,
    qk_norm: bool = False,
    beta_logits: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply KDA to many tokens at once, for prefill and training.

    bf16, fp16 and fp32 inputs, in any mix, compute in fp32; fp64 inputs in fp64. The Triton
    backend multiplies matrices in v's dtype and adds up in fp32.

    Args:
        q: [B, T, H, K]. Queries, L2-normalised unless qk_norm; T may be 0.
        k: [B, T, H, K]. Keys, L2-normalised unless qk_norm.
        v: [B, T, HV, V]. Values; HV is a multiple of H, and value head h reads the query and
            key of head h // (HV // H).
        g: [B, T, HV, K]. Natural log decay, <= 0; with a gate, its projection f.
        beta: [B, T, HV]. Write strength in (0, 1); with beta_logits, before the sigmoid.
        scale: Multiplies q only; K ** -0.5 if None.
        initial_state: [N, HV, K, V] fp32 (fp64 for fp64 inputs); zeros if None. N is B, or the
            number of packed sequences.
        gate: The law that makes g a log decay; A_log [HV], dt_bias [HV, K].
        qk_norm: Divide q and k by sqrt(sum of squares + 1e-6) first.
        beta_logits: Take the sigmoid of beta first.
        cu_seqlens: [N + 1] int32 | int64. Where B is 1, T holds N sequences one after another:
            the n-th has the tokens cu_seqlens[n] to cu_seqlens[n + 1], and may be empty.
        chunk_size: Tokens that are solved together, a power of two up to 256: a matter of
            speed and rounding only. None takes the measured best; Triton's is fixed.
        backend: "torch", "triton" or "cuda"; None takes the fastest that serves the call. "cuda" is
            Triton but for two stages, which exist in CUDA C++ for bf16 keys of 128 channels.

    Returns:
        Output [B, T, HV, V] in v's dtype and the final state [N, HV, K, V] fp32 (fp64 for
        fp64 inputs), which never shares memory with initial_state.

    Raises:
        KernelInputError: A shape, dtype, device or option does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, section 3.
    """
    size = _checked_chunk_size(chunk_size)
    options = Options(
        scale=scale,
        initial_state=initial_state,
        gate=gate,
        qk_norm=qk_norm,
        beta_logits=beta_logits,
        cu_seqlens=cu_seqlens,
    )
    call = check_arguments("chunk_kda", q, k, v, g, beta, options)
    if v.numel() == 0:
        return torch.empty_like(v), call.state().clone()
    refused = "the Triton kernels have a chunk size of their own" if chunk_size else None
    chosen = _backend("chunk_kda", call, backend, refused, also=(Backend.CUDA,))
    if chosen is not Backend.TORCH:
        from kimi_convert.kernels.kda.chunk_gpu import chunk_kda_gpu

        with launching_on(v.device):
            return chunk_kda_gpu(call, None if backend is None else chosen)

    def form(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_kda_forward(*inputs, scale=call.scale, state=state, chunk_size=size)

    return _run_plain(call, form)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    gate: Gate | None = None,
    qk_norm: bool = False,
    beta_logits: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply KDA token by token, for decode and as the plain form of `chunk_kda`.

    Arguments, results and errors are those of `chunk_kda`, but for the backend: None takes torch.
    The Triton kernel has no gradients.

    Source: Kimi Linear report, arXiv 2510.26692, Eq. 1.
    """
    options = Options(
        scale=scale,
        initial_state=initial_state,
        gate=gate,
        qk_norm=qk_norm,
        beta_logits=beta_logits,
        cu_seqlens=cu_seqlens,
    )
    call = check_arguments("recurrent_kda", q, k, v, g, beta, options)
    if v.numel() == 0:
        return torch.empty_like(v), call.state().clone()
    refused = "the recurrent Triton kernel has no gradients" if call.needs_grad else None
    if _backend("recurrent_kda", call, backend or Backend.TORCH, refused) is Backend.TRITON:
        with launching_on(v.device):
            return _decode(call)

    def form(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
        computed = (x.to(call.dtype) for x in inputs)
        output, state = recurrent_kda_reference(*computed, scale=call.scale, state=state)
        return output.to(v.dtype), state

    return _run_plain(call, form)


def _decode(call: Arguments) -> tuple[Tensor, Tensor]:
    """Run the recurrent Triton kernel."""
    from kimi_convert.kernels.kda.chunk_gpu import law_of
    from kimi_convert.kernels.kda.decode import recurrent_kda_triton

    gate = call.gate
    return recurrent_kda_triton(
        *(call.q, call.k, call.v, call.g, call.beta),
        scale=call.scale,
        state=call.initial_state,
        qk_norm=call.qk_norm,
        law=law_of(call),
        A_log=None if gate is None else gate.A_log,
        dt_bias=None if gate is None else gate.dt_bias,
        lower_bound=call.lower_bound,
        beta_logits=call.beta_logits,
        cu_seqlens=call.cu_seqlens,
    )


def _run_plain(call: Arguments, form: _Form) -> tuple[Tensor, Tensor]:
    """Run a torch form, on packed sequences one after another."""
    inputs, state = call.plain(), call.state()
    if call.cu_seqlens is None:
        return form(inputs, state)
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    bounds: list[int] = call.cu_seqlens.tolist()
    for n, (start, stop) in enumerate(pairwise(bounds)):
        before = state[n : n + 1]
        if start == stop:
            states.append(before.clone())
            continue
        output, after = form(tuple(x[:, start:stop] for x in inputs), before)
        outputs.append(output)
        states.append(after)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _backend(
    where: str,
    call: Arguments,
    backend: Backend | str | None,
    refused: str | None,
    *,
    also: tuple[Backend, ...] = (),
) -> Backend:
    """Return what runs; Triton is refused where it is asked for and cannot.

    Args:
        where: name of the public function, for the error.
        call: what is to run.
        backend: asked for.
        refused: why Triton cannot serve it, beyond what is checked here.
        also: backends beyond torch and Triton that the function has.
    """
    device, dtype = call.v.device, call.dtype
    chosen = resolve_backend(backend, where=where, device=device, dtype=dtype, also=also)
    if chosen is Backend.TORCH:
        return chosen
    problem = refused
    if max(call.q.shape[-1], call.v.shape[-1]) > _TRITON_WIDTHS:
        problem = f"keys and values are wider than {_TRITON_WIDTHS}"
    if problem is None or backend is None:
        return Backend.TORCH if problem else chosen
    raise KernelInputError(
        problem,
        where=where,
        expected="a call that Triton serves",
        found=f'backend="{backend}"',
        hint='Pass backend="torch", or None to let the call decide.',
    )


def _checked_chunk_size(chunk_size: int | None) -> int:
    if chunk_size is None:
        return CHUNK_SIZE
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise KernelInputError(
            "chunk_size is not a power of two in range",
            where="chunk_kda",
            expected=f"a power of two from 1 to {MAX_CHUNK_SIZE}",
            found=chunk_size,
            hint="Leave chunk_size out to get the measured best.",
        )
    return chunk_size
