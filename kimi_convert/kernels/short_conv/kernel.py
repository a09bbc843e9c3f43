"""The forward pass of the short convolution on Triton: q, k and v in one launch.

    z_t = sum_w weight_w x_{t - (W - 1) + w};   y_t = z_t sigmoid(z_t)

A program owns BT tokens of one sequence and BP channels of one input; inputs lie one after another
in the program id. Sums are fp32, y is rounded once. A row before the sequence comes from the state,
or is 0, as are lanes past the last channel or token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.backend import launching_on
from kimi_convert.kernels.rows import as_rows
from kimi_convert.kernels.short_conv.call import Call, Convolved
from kimi_convert.kernels.short_conv.device import (
    load_rows,
    load_taps,
    locate_channels,
    locate_tile,
    of_stream,
)
from kimi_convert.kernels.short_conv.tiling import block_channels, per_stream, tiles_of

# Tokens of a tile at most; of fewer, the next power of two. 19 rows of 8 bytes a thread are in
# flight at W=4, and the halo costs 3 rows in 16, from the L2 cache. A guess, not measured yet.
BLOCK_TOKENS = 16
_CHANNELS_PER_THREAD = 4
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["blocks", "length", "tiles_each", "num_sequences", "num_tokens"])
def short_conv_forward_kernel(
    # inputs
    q,  # [M, q_width], rows q_row apart
    k,  # [M, k_width] or None
    v,  # [M, v_width] or None
    q_weight,  # [q_width, W]
    k_weight,  # [k_width, W]
    v_weight,  # [v_width, W]
    q_past,  # [N, q_width, W - 1] or None
    k_past,  # [N, k_width, W - 1] or None
    v_past,  # [N, v_width, W - 1] or None
    cu_seqlens,  # [N + 1], where PACKED
    tile_offsets,  # [N + 1], where PACKED
    # outputs
    q_y,  # [M, q_width]
    k_y,  # [M, k_width]
    v_y,  # [M, v_width]
    q_last,  # [N, q_width, W - 1]; may be q_past where a sequence is one tile
    k_last,  # [N, k_width, W - 1]
    v_last,  # [N, v_width, W - 1]
    # sizes
    blocks,  # of channels, of all inputs
    length,  # tokens of a sequence, where not PACKED
    tiles_each,  # tiles of a sequence, where not PACKED
    num_sequences,
    num_tokens,  # M
    q_width,
    k_width,  # 0 where there is no k
    v_width,
    # strides, from one token to the next
    q_row,
    k_row,
    v_row,
    # meta
    W: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,  # N, padded to a power of two
    PACKED: tl.constexpr,
):
    """Convolve one tile; the id is (tile of tokens, block of channels), last fastest.

    The last tile of a sequence writes the new state. That may go over the old one where a sequence
    is one tile: all that a program reads of it is loaded, by whichever threads, before a barrier,
    and stored after it.
    """
    i_n, start, stop, first = locate_tile(
        tl.program_id(0) // blocks, cu_seqlens, tile_offsets,
        length, tiles_each, num_sequences, num_tokens, BT, BN, PACKED,
    )  # fmt: skip
    i_s, i_p = locate_channels(blocks, q_width, k_width, BP)
    x = of_stream(i_s, q, k, v)
    y = of_stream(i_s, q_y, k_y, v_y)
    width = of_stream(i_s, q_width, k_width, v_width)
    row = of_stream(i_s, q_row, k_row, v_row)
    p_state = i_n.to(tl.int64) * width * (W - 1)
    past = None if q_past is None else of_stream(i_s, q_past, k_past, v_past) + p_state
    o_p = i_p * BP + tl.arange(0, BP)
    taps = load_taps(of_stream(i_s, q_weight, k_weight, v_weight), o_p, width, W)
    rows = load_rows(
        x, past, first - (W - 1), start, stop, o_p, width, row, W, W - 1, W - 1 + BT
    )  # fmt: skip
    p_y = y + first * width + o_p
    for i in tl.static_range(BT):
        z = rows[i].to(tl.float32) * taps[0]
        for w in tl.static_range(1, W):
            z += rows[i + w].to(tl.float32) * taps[w]
        channels = tl.where(first + i < stop, width, 0)
        tl.store(p_y, (z / (1 + tl.exp(-z))).to(q_y.dtype.element_ty), mask=o_p < channels)
        p_y += width
    if (stop - first <= BT) & ((first < stop) | (first == start)):
        kept = load_rows(
            x, past, stop - (W - 1), start, stop, o_p, width, row, W, W - 1, W - 1
        )  # fmt: skip
        tl.debug_barrier()
        p_last = of_stream(i_s, q_last, k_last, v_last) + p_state + o_p * (W - 1)
        for j in tl.static_range(W - 1):
            tl.store(p_last + j, kept[j], mask=o_p < width)


def short_conv_forward(call: Call) -> tuple[Convolved, ...]:
    """Launch the kernel on a call for one launch, with at least one token; allocate what it writes."""
    results = tuple(
        Convolved(
            torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty((call.N, x.shape[2], call.W - 1), dtype=x.dtype, device=x.device),
        )
        for x, _, _ in call.streams
    )
    _launch(call, results)
    return results


def short_conv_forward_(call: Call) -> tuple[Tensor, ...]:
    """Launch the kernel on up to BLOCK_TOKENS tokens, not packed; write over the states.

    The states must be contiguous. Only the outputs are allocated, and nothing waits.
    """
    results: list[Convolved] = []
    for x, _, state in call.streams:
        assert state is not None
        results.append(Convolved(torch.empty(x.shape, dtype=x.dtype, device=x.device), state))
    _launch(call, tuple(results))
    return tuple(result.y for result in results)


def _launch(call: Call, results: tuple[Convolved, ...]) -> None:
    tiles = tiles_of(call, BLOCK_TOKENS)
    inputs = [as_rows(stream.x) for stream in call.streams]
    BP, blocks = block_channels(inputs, per_thread=_CHANNELS_PER_THREAD, num_warps=_NUM_WARPS)
    states = [None if s.state is None else s.state.contiguous() for s in call.streams]
    with launching_on(call.device):
        short_conv_forward_kernel[(tiles.total * blocks,)](
            *per_stream(inputs),
            *per_stream([stream.weight.contiguous() for stream in call.streams]),
            *per_stream(states),
            *(call.cu_seqlens, tiles.offsets),
            *per_stream([result.y for result in results]),
            *per_stream([result.state for result in results]),
            *(blocks, call.T, tiles.each, call.N, inputs[0].shape[0]),
            *per_stream([x.shape[1] for x in inputs], missing=0),
            *per_stream([x.stride(0) for x in inputs], missing=0),
            W=call.W,
            BT=tiles.size,
            BP=BP,
            BN=tiles.padded_sequences,
            PACKED=call.cu_seqlens is not None,
            num_warps=_NUM_WARPS,
        )
