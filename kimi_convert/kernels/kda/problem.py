"""One call of chunked KDA as the Triton kernels see it: checked, contiguous, with all sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import KernelInterface

from kimi_convert.kernels.kda.device import SINGLE_PRECISION

TILE_K = 64  # key channels that `intra` takes at a time
TILE_V = 64  # value channels that the gradients take at a time


@dataclass(slots=True, kw_only=True)
class Problem:
    """Tensors are contiguous; T tokens of each of N sequences, or N packed ones where B is 1.

    Nothing changes once it is made. Sizes are worked out here, not where they are read: a short call
    waits for nothing as long as for Python.
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

    N: int = field(init=False)  # sequences
    T: int = field(init=False)  # tokens of a sequence, or of all where packed
    H: int = field(init=False)  # heads of q and k
    HV: int = field(init=False)  # heads of v, g, beta and the state
    K: int = field(init=False)  # width of a key
    V: int = field(init=False)  # width of a value
    # K, padded to a power of two, and to no less than the key channels that `intra` takes at a time.
    # Narrower products read shared memory that is not theirs: Triton 3.6, tiles of 16 and 32
    # channels, found with compute-sanitizer.
    BK: int = field(init=False)
    BV: int = field(init=False)  # V, padded to a power of two that a matrix product takes
    BN: int = field(init=False)  # packed sequences, padded to a power of two; else 1
    packed: bool = field(init=False)  # whether the sequences lie one after another
    num_chunks: int = field(init=False)  # of each sequence; of the longest possible where packed
    total_chunks: int = field(init=False)  # of all; where packed, no fewer than there can be
    dtype: torch.dtype = field(init=False)  # that matrix products are computed on: v's
    rehearsed: bool = field(init=False)  # on the meta device: kernels are compiled, not launched

    def __post_init__(self) -> None:
        """Work out the sizes."""
        B, self.T, self.H, self.K = self.q.shape
        self.HV, self.V = self.v.shape[2:]
        self.packed = self.cu_seqlens is not None
        self.N = B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.BK, self.BV = max(padded(self.K), TILE_K), padded(self.V)
        self.BN = padded(self.N) if self.packed else 1
        self.num_chunks = -(-self.T // self.C)
        self.total_chunks = self.T // self.C + self.N if self.packed else self.N * self.num_chunks
        self.dtype = self.v.dtype
        self.rehearsed = self.v.is_meta

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate scratch or output in the operands' dtype, or another."""
        return self.v.new_empty(shape, dtype=dtype)

    def launcher(self, kernel: KernelInterface[Any], *grid: int) -> Callable[..., object]:
        """Return what launches a kernel, or compiles it where the problem is rehearsed."""
        return partial(kernel.run, grid=grid, warmup=self.rehearsed)

    def aligned(self, values: Tensor, tile: int) -> bool:
        """Whether tiles of values [B, T, HV, V] hold whole heads, and every row starts at 16 bytes."""
        width = self.V * values.itemsize
        return self.V % tile == 0 and width % 16 == 0 and values.data_ptr() % 16 == 0

    @property
    def precision(self) -> str:
        """How fp32 operands are multiplied; of no effect for others."""
        return SINGLE_PRECISION.value if self.dtype == torch.float32 else "tf32"


def allow_descriptors() -> None:
    """Let kernels make tensor descriptors, which lie in memory that Triton asks PyTorch for."""
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def padded(size: int) -> int:
    """Return the next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
