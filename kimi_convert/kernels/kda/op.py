"""The public KDA functions: check the arguments, choose the dtype, run one of the forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.checks import expect, expect_dtype, expect_precision
from kimi_convert.kernels.kda.chunk import CHUNK_SIZE, chunk_kda_forward
from kimi_convert.kernels.kda.reference import recurrent_kda_reference

MAX_CHUNK_SIZE = 256  # the triangular matrices of a chunk take chunk_size values per token


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply KDA to many tokens at once, for prefill and training.

    bf16, fp16 and fp32 inputs, in any mix, compute in fp32; fp64 inputs in fp64.

    Args:
        q: [B, T, H, K]. Queries, L2-normalised; T may be 0.
        k: [B, T, H, K]. Keys, L2-normalised.
        v: [B, T, H, V]. Values.
        g: [B, T, H, K]. Natural log decay, <= 0.
        beta: [B, T, H]. Write strength in (0, 1), not logits.
        scale: Multiplies q only; K ** -0.5 if None.
        initial_state: [B, H, K, V] fp32 (fp64 for fp64 inputs); zeros if None.
        chunk_size: Tokens that are solved together, a power of two up to 256: a matter of
            speed and rounding only. None takes the measured best.

    Returns:
        Output [B, T, H, V] in v's dtype and the final state [B, H, K, V] fp32 (fp64 for
        fp64 inputs), which never shares memory with initial_state.

    Raises:
        KernelInputError: A shape, dtype or device does not fit, or the chunk size.

    Source: Kimi Linear report, arXiv 2510.26692, section 3.
    """
    chunk_size = _checked_chunk_size(chunk_size)
    state = _checked_state("chunk_kda", q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    if v.numel() == 0:
        return torch.empty_like(v), state.clone()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return chunk_kda_forward(q, k, v, g, beta, scale=scale, state=state, chunk_size=chunk_size)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply KDA token by token, for decode and as the plain form of `chunk_kda`.

    bf16, fp16 and fp32 inputs, in any mix, compute in fp32; fp64 inputs in fp64.

    Args:
        q: [B, T, H, K]. Queries, L2-normalised; T may be 0.
        k: [B, T, H, K]. Keys, L2-normalised.
        v: [B, T, H, V]. Values.
        g: [B, T, H, K]. Natural log decay, <= 0.
        beta: [B, T, H]. Write strength in (0, 1), not logits.
        scale: Multiplies q only; K ** -0.5 if None.
        initial_state: [B, H, K, V] fp32 (fp64 for fp64 inputs); zeros if None.

    Returns:
        Output [B, T, H, V] in v's dtype and the final state [B, H, K, V] fp32 (fp64 for
        fp64 inputs), which never shares memory with initial_state.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, Eq. 1.
    """
    state = _checked_state(
        "recurrent_kda", q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state
    )
    if v.numel() == 0:
        return torch.empty_like(v), state.clone()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    computed = (x.to(state.dtype) for x in (q, k, v, g, beta))
    output, state = recurrent_kda_reference(*computed, scale=scale, state=state)
    return output.to(v.dtype), state


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


def _checked_state(
    where: str,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
) -> Tensor:
    """Check all arguments; return the state to start from, in the dtype to compute in."""
    specs = {
        "q": (q, "B T H K"),
        "k": (k, "B T H K"),
        "v": (v, "B T H V"),
        "g": (g, "B T H K"),
        "beta": (beta, "B T H"),
    }
    if initial_state is not None:
        specs["initial_state"] = (initial_state, "B H K V")
    dims = expect(where, **specs)
    dtype = expect_precision(where, q=q, k=k, v=v, g=g, beta=beta)
    if initial_state is None:
        return v.new_zeros([dims[dim] for dim in "BHKV"], dtype=dtype)
    expect_dtype(where, dtype, initial_state=initial_state)
    return initial_state
