"""One call of chunked KDA as the Triton kernels see it: checked, contiguous, with all sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

TILE_K = 64  # key channels that `intra` takes at a time
TILE_V = 64  # value channels that the gradients take at a time


@dataclass(frozen=True, kw_only=True)  # without slots, which have no cached properties
class Problem:
    """Tensors are contiguous; T tokens of each of N sequences, or N packed ones where B is 1.

    Sizes are worked out once: a short call waits for nothing as long as for Python.
    """

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K]
    beta: Tensor  # [B, T, HV]
    scale: float
    A_log: Tensor | None  # [HV]
    dt_bias: Tensor | None  # [HV, K]
    law: int
    lower_bound: float
    qk_norm: bool
    beta_logits: bool
    cu_seqlens: Tensor | None  # [N + 1] int32 | int64, on the device
    chunk_offsets: Tensor | None  # [N + 1] int32: chunks before each sequence
    C: int  # tokens of a chunk, a power of two

    @cached_property
    def N(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @cached_property
    def T(self) -> int:
        """Tokens of a sequence, or of all where packed."""
        return self.q.shape[1]

    @cached_property
    def H(self) -> int:
        """Heads of q and k."""
        return self.q.shape[2]

    @cached_property
    def HV(self) -> int:
        """Heads of v, g, beta and the state."""
        return self.v.shape[2]

    @cached_property
    def K(self) -> int:
        """Width of a key."""
        return self.q.shape[3]

    @cached_property
    def V(self) -> int:
        """Width of a value."""
        return self.v.shape[3]

    @cached_property
    def BK(self) -> int:
        """K, padded to a power of two; to no less than the key channels that `intra` takes at a time.

        Narrower products read shared memory that is not theirs: Triton 3.6, tiles of 16 and 32
        channels, found with compute-sanitizer.
        """
        return max(padded(self.K), TILE_K)

    @cached_property
    def BV(self) -> int:
        """V, padded to a power of two that a matrix product takes."""
        return padded(self.V)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed on: v's dtype."""
        return self.v.dtype

    @cached_property
    def num_chunks(self) -> int:
        """Chunks of each sequence; of the longest possible one where packed."""
        return -(-self.T // self.C)

    @cached_property
    def total_chunks(self) -> int:
        """Chunks of all sequences; where packed, no fewer than there can be."""
        if self.cu_seqlens is None:
            return self.N * self.num_chunks
        return self.T // self.C + self.N

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate scratch or output in the operands' dtype, or another."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.v.device)

    def aligned(self, values: Tensor, tile: int) -> bool:
        """Whether tiles of values [B, T, HV, V] hold whole heads, and every row starts at 16 bytes."""
        width = self.V * values.itemsize
        return self.V % tile == 0 and width % 16 == 0 and values.data_ptr() % 16 == 0

    @cached_property
    def packed(self) -> bool:
        """Whether the sequences lie one after another."""
        return self.cu_seqlens is not None

    @property
    def BN(self) -> int:
        """Sequences, padded to a power of two."""
        return padded(self.N) if self.packed else 1

    @cached_property
    def precision(self) -> str:
        """How fp32 operands are multiplied: in three tf32 products; of no effect for others."""
        return "tf32x3" if self.dtype == torch.float32 else "tf32"


def allow_descriptors() -> None:
    """Let kernels make tensor descriptors, which lie in memory that Triton asks PyTorch for."""
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def padded(size: int) -> int:
    """Return the next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
