"""Packed sequences: N of them one after another in one row of tokens, told apart by offsets."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError


def check_packed(where: str, cu_seqlens: Tensor, *, rows: int, length: int) -> Tensor:
    """Check the offsets of packed sequences; return them contiguous.

    Reads the values, which waits for a GPU, except while a CUDA graph is being captured: there
    kernels stay within their tensors whatever the values are.

    Args:
        where: name of the public function, for the error.
        cu_seqlens: [N + 1] int32 | int64, from 0 to the number of tokens, never decreasing.
        rows: B, which must be 1.
        length: tokens of all sequences.

    Raises:
        KernelInputError: names what was expected and what was found.
    """
    if rows != 1:
        raise KernelInputError(
            "packed sequences have the wrong shape",
            where=where,
            expected="B=1: all sequences one after another in T",
            found=f"B={rows}",
            hint="Flatten the batch into T, or leave cu_seqlens out.",
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise _wrong(where, "an int32 or int64 tensor", found)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise _wrong(where, "[N + 1] offsets of N > 0 sequences", list(cu_seqlens.shape))
    if not (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        _check_values(where, cu_seqlens.tolist(), length)
    return cu_seqlens.contiguous()


def tile_offsets(cu_seqlens: Tensor, size: int) -> Tensor:
    """Return how many tiles of tokens lie before each sequence, and in all of them, [N + 1] int32.

    Every sequence is cut by itself into tiles of `size` tokens, the last one shorter; an empty one
    has one tile too. Nothing waits for a GPU.
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    offsets = torch.zeros_like(cu_seqlens, dtype=torch.int32)
    torch.cumsum(((lengths + size - 1) // size).clamp_min(1), 0, out=offsets[1:])
    return offsets


def _check_values(where: str, offsets: list[int], length: int) -> None:
    if offsets[0] != 0:
        raise _wrong(where, "a first offset of 0", offsets[0])
    if offsets[-1] != length:
        raise _wrong(where, f"a last offset of {length}, the number of tokens", offsets[-1])
    for n, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise _wrong(where, "offsets that never decrease", f"{start}, {stop} at {n}")


def _wrong(where: str, expected: str, found: object) -> KernelInputError:
    return KernelInputError(
        "cu_seqlens is not valid",
        where=where,
        expected=expected,
        found=found,
        hint="Pass the running sum of the sequences' lengths, with a 0 before it.",
    )
