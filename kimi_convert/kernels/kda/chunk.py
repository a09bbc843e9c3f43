"""The chunked form of KDA in plain torch: batched matmuls, and one loop over chunks.

`chunk_kda_reference` gives the formula. Two things differ here.

No decay is ever divided out. exp(G_i - G_j) is needed for all i >= j of a chunk; split into
exp(G_i) exp(-G_j) it overflows, and as a difference of sums it loses digits when strong and
weak gates meet. Here a chunk is halved again and again. For a row i in the right half and a
row j in the left half, with the boundary b between the halves,

    exp(G_i - G_j) = exp(g_b + ... + g_i) * exp(g_{j+1} + ... + g_{b-1})

and both factors are products of decays, at most 1, never a quotient. Going up from blocks of
one token, the factors of a block of 2s tokens are those of its halves, times the whole decay of
the other half. A factor that underflows stands for a decay below 1e-38.

The inverse of the unit lower triangular system grows along, from X and Y of the two halves:

    [[A, 0], [L, B]]^-1 = [[X, 0], [-Y L X, Y]]

Work goes in segments of whole chunks, so that temporaries stay small for any length. Tokens
after the last whole chunk form one chunk of their own, padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Best of 25 in ms, fp32, torch 2.13, a shared AMD EPYC (Zen 5): a tenth either way is noise.
#                                         C = 16    32    64   128   token by token
#   1 thread,  B=1  T=512  H=4  K=V=64       3.4   3.2   3.8   4.8     13
#   1 thread,  B=1  T=1024 H=16 K=V=128     59.9  51.9  57.0  76.1    122
#   1 thread,  B=16 T=512  H=4  K=V=64      44.2  46.8  52.8  75.1     72
#   2 threads, B=1  T=4096 H=4  K=V=64      24.9  22.6  21.1  27.0    114
# 32 and 64 are about as fast; for keys that are alike, 64 has up to 2.4 times the error of the
# recurrence, 32 up to 1.8 times.
CHUNK_SIZE = 32
# Elements of q in a segment. 1 thread, B=1 T=1024 H=16 K=V=128, ms at 2^16 to 2^21:
# 64.1, 56.2, 57.3, 57.6, 66.5, 85.0. Smaller is overhead, larger leaves the cache.
SEGMENT_ELEMENTS = 2**18


class _Chunks(NamedTuple):
    """What M chunks need to pass the state through them: rows i, columns j of a chunk."""

    q: Tensor  # [M, C, K]  exp(G_i) q_i
    k_in: Tensor  # [M, C, K]  beta_i exp(G_i) k_i
    k_out: Tensor  # [M, C, K]  exp(G_C - G_j) k_j
    decay: Tensor  # [M, 1, K]  exp(G_C)
    reads: Tensor  # [M, C, C]  q_i . exp(G_i - G_j) k_j, lower triangle with diagonal
    inverse: Tensor  # [M, C, C]  (I + beta_i k_i . exp(G_i - G_j) k_j, strict lower triangle)^-1


def chunk_kda_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule in chunks; the result is that of the recurrence.

    Args:
        q: [B, T, H, K], B and T above 0.
        k: [B, T, H, K].
        v: [B, T, H, V].
        g: [B, T, H, K]. Natural log decay, <= 0; -inf forgets.
        beta: [B, T, H].
        scale: Multiplies q.
        state: [B, H, K, V], in the dtype to compute in.
        chunk_size: Tokens of a chunk, a power of two.

    Returns:
        Output [B, T, H, V] in v's dtype and the final state [B, H, K, V] in the state's dtype.
    """
    inputs = (q, k, v, g, beta.unsqueeze(-1))
    batch, length, heads, _ = q.shape
    token_elements = batch * heads * max(q.shape[-1], v.shape[-1])
    memory = state.flatten(0, 1)  # [B * H, K, V]
    outputs: list[Tensor] = []
    for start, stop, size in _segments(
        length, chunk_size=chunk_size, max_tokens=SEGMENT_ELEMENTS // token_elements
    ):
        q_c, k_c, v_c, g_c, beta_c = (
            _to_chunks(x[:, start:stop], size=size, dtype=state.dtype) for x in inputs
        )
        chunks = _solve(scale * q_c, k_c, g_c.exp(), beta_c)
        parts, memory = _pass_state(chunks, beta_c * v_c, memory)
        for part in parts:
            tokens = part.unflatten(0, (batch, heads)).transpose(1, 2).to(v.dtype)
            outputs.append(tokens[:, : stop - start])  # cuts the padding off a tail
    return torch.cat(outputs, dim=1), memory.unflatten(0, (batch, heads))


def _segments(length: int, *, chunk_size: int, max_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, chunk size) of whole-chunk segments, then of the tail."""
    step = max(max_tokens // chunk_size, 1) * chunk_size
    whole = length - length % chunk_size
    for start in range(0, whole, step):
        yield start, min(start + step, whole), chunk_size
    if whole < length:
        yield whole, length, 1 << (length - whole - 1).bit_length()


def _to_chunks(x: Tensor, *, size: int, dtype: torch.dtype) -> Tensor:
    """Bring [B, T, H, D] into [N * B * H, C, D]; pad with zeros, which leave the state alone."""
    x = x.to(dtype)
    padding = -x.shape[1] % size
    if padding:
        x = pad(x, (0, 0, 0, 0, 0, padding))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).flatten(0, 2)


def _solve(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor) -> _Chunks:
    """Grow blocks of one token to whole chunks, doubling (see the module docstring).

    Args:
        q: [M, C, K]. Scaled queries.
        k: [M, C, K]. Keys.
        decay: [M, C, K]. exp(g).
        beta: [M, C, 1].

    Returns:
        Everything about the chunks that does not depend on the state.
    """
    size = q.shape[1]
    reads = (q * k).sum(dim=-1, keepdim=True).unsqueeze(-1)  # [M, C, 1, 1]
    inverse = torch.ones_like(reads)
    rows_q, rows_k, columns = q * decay, k * decay * beta, k
    block = 1
    while block < size:
        # [M, blocks / 2, 2, block, K]: axis 2 is the left and the right half.
        halves = (-1, 2, block)
        rows_q, rows_k, columns = (x.unflatten(1, halves) for x in (rows_q, rows_k, columns))
        left = columns[:, :, 0].mT
        reads = _join(reads, rows_q[:, :, 1] @ left)
        crossing = rows_k[:, :, 1] @ left
        inverse = _join(inverse, -inverse[:, 1::2] @ crossing @ inverse[:, 0::2])
        decay = decay.unflatten(1, (-1, 2, 1))  # [M, blocks / 2, 2, 1, K]
        one = torch.ones_like(decay[:, :, :1])
        before = torch.cat((one, decay[:, :, :1]), dim=2)
        after = torch.cat((decay[:, :, 1:], one), dim=2)
        rows_q, rows_k, columns = (
            x.flatten(1, 3) for x in (rows_q * before, rows_k * before, columns * after)
        )
        decay = (decay[:, :, 0] * decay[:, :, 1]).flatten(1, 2)  # [M, blocks / 2, K]
        block *= 2
    return _Chunks(rows_q, rows_k, columns, decay, reads.squeeze(1), inverse.squeeze(1))


def _join(diagonal: Tensor, crossing: Tensor) -> Tensor:
    """Join pairs of blocks [M, n, s, s] below by [M, n / 2, s, s] into [M, n / 2, 2s, 2s]."""
    upper = pad(diagonal[:, 0::2], (0, crossing.shape[-1]))
    return torch.cat((upper, torch.cat((crossing, diagonal[:, 1::2]), dim=-1)), dim=-2)


def _pass_state(chunks: _Chunks, v: Tensor, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Carry the state [B * H, K, V] through N chunks; v is beta_i v_i [M, C, V].

    Returns:
        The N outputs [B * H, C, V] and the last state.
    """
    # unbind, not indexing: its gradient is one stack instead of N full-size tensors.
    steps = (x.unflatten(0, (-1, len(state))).unbind() for x in (*chunks, v))
    outputs: list[Tensor] = []
    for q, k_in, k_out, decay, reads, inverse, v_in in zip(*steps, strict=True):
        # Not baddbmm: for few rows it rounds every product at the size of what it adds to.
        delta = inverse @ (v_in - k_in @ state)
        outputs.append(q @ state + reads @ delta)
        state = torch.addcmul(k_out.mT @ delta, decay.mT, state)
    return outputs, state
