"""How a call of the short convolution is cut into programs: tiles of tokens, blocks of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import triton
from torch import Tensor

from kimi_convert.kernels.packing import tile_offsets
from kimi_convert.kernels.short_conv.call import Call

_STREAMS = 3  # that one launch takes
_WARP = 32

_Value = TypeVar("_Value")


class Tiles(NamedTuple):
    """Tiles of the tokens of all sequences."""

    size: int  # tokens, a power of two
    total: int  # of all sequences; where packed, no fewer than there can be
    each: int  # of a sequence, where not packed
    offsets: Tensor | None  # [N + 1] int32, tiles before each sequence and of all, where packed
    padded_sequences: int  # a power of two where packed, else 1


def tiles_of(call: Call, block_tokens: int) -> Tiles:
    """Cut a call with at least one token into tiles of up to block_tokens tokens."""
    size = min(triton.next_power_of_2(call.T), block_tokens)
    if call.cu_seqlens is None:
        each = triton.cdiv(call.T, size)
        return Tiles(size, call.N * each, each, None, 1)
    offsets = tile_offsets(call.cu_seqlens, size)
    return Tiles(size, call.T // size + call.N, 0, offsets, triton.next_power_of_2(call.N))


def block_channels(
    inputs: Sequence[Tensor], *, per_thread: int, num_warps: int
) -> tuple[int, int]:
    """Return the channels of a program, a power of two, and the blocks of them in all inputs."""
    widths = [x.shape[1] for x in inputs]
    block = min(num_warps * _WARP * per_thread, triton.next_power_of_2(max(widths)))
    return block, sum(triton.cdiv(width, block) for width in widths)


def per_stream(values: Sequence[_Value], missing: int | None = None) -> tuple[_Value | None, ...]:
    """Return one argument for each input that a kernel takes; `missing` where there are fewer."""
    return (*values, *[missing] * (_STREAMS - len(values)))  # type: ignore[return-value]
