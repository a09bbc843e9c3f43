"""The backward pass of the short convolution on Triton: q, k and v in one launch.

With X the state followed by x, so that z_t = sum_w weight_w X_{t + w}, and s = sigmoid(z),

    dz_t     = dy_t s_t (1 + z_t (1 - s_t))
    dX_j     = sum_w weight_w dz_{j - w}, plus the gradient of the new state, X's last W - 1 values
    dweight_w = sum_t dz_t X_{t + w}

z is computed again: x is read anyway. A program takes several tiles one after another and writes
one row of the weights' partial sums, which are added in an order that never changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.backend import launching_on
from kimi_convert.kernels.partial_sums import add_rows
from kimi_convert.kernels.rows import as_rows
from kimi_convert.kernels.short_conv.call import Call
from kimi_convert.kernels.short_conv.device import (
    load_rows,
    load_taps,
    locate_channels,
    locate_tile,
    of_stream,
)
from kimi_convert.kernels.short_conv.tiling import block_channels, per_stream, tiles_of

# Guesses, not measured yet. Narrower than forward: twice as many rows are held.
_BLOCK_TOKENS = 8
_CHANNELS_PER_THREAD = 2
_NUM_WARPS = 4
_PROGRAMS = 1056  # 8 for each multiprocessor of an H200


class Gradients(NamedTuple):
    """Of one input."""

    x: Tensor  # [B, T, P]
    weight: Tensor  # [P, 1, W]
    state: Tensor | None  # [N, P, W - 1]; None if zeros were before x


@triton.jit
def backpropagate_to_state(d_z, taps, d_last, d_past, o_p, width, length, W: tl.constexpr):
    """Write the gradients of the state [P, W - 1] before a sequence, of its first tile's d_z.

    Where the sequence is shorter than the state, the end of the old one is in the new one.
    """
    for j in tl.static_range(W - 1):
        b_dpast = d_z[j] * taps[0]
        for w in tl.static_range(1, j + 1):
            b_dpast += d_z[j - w] * taps[w]
        if d_last is not None:
            m_last = o_p < tl.where(j >= length, width, 0)
            p_last = d_last + o_p * (W - 1) + (j - length)
            b_dpast += tl.load(p_last, mask=m_last, other=0).to(tl.float32)
        p_past = d_past + o_p * (W - 1) + j
        tl.store(p_past, b_dpast.to(d_past.dtype.element_ty), mask=o_p < width)


@triton.jit
def backpropagate_tile(
    sums, taps, x, past, d_y, d_last, d_x, d_past, width, row, d_row,
    o_p, i_n, start, stop, first, W: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile's inputs, and those of the state before a first tile.

    Returns:
        `sums`, W vectors [BP] fp32, with the tile's part of the weight's gradient added.
    """
    i_state = i_n.to(tl.int64) * width * (W - 1)
    old = None if past is None else past + i_state
    # Gradients of BT tokens come from BT + W - 1 outputs.
    rows = load_rows(
        x, old, first - (W - 1), start, stop, o_p, width, row, W, W - 1, BT + 2 * (W - 1)
    )  # fmt: skip
    d_rows = load_rows(d_y, None, first, start, stop, o_p, width, d_row, W, 0, BT + W - 1)
    d_z = ()
    for i in tl.static_range(BT + W - 1):
        z = rows[i].to(tl.float32) * taps[0]
        for w in tl.static_range(1, W):
            z += rows[i + w].to(tl.float32) * taps[w]
        s = 1 / (1 + tl.exp(-z))
        d_z += (d_rows[i].to(tl.float32) * s * (1 + z * (1 - s)),)
    p_dx = d_x + first * width + o_p
    for i in tl.static_range(BT):
        b_dx = d_z[i + W - 1] * taps[0]
        for w in tl.static_range(1, W):
            b_dx += d_z[i + W - 1 - w] * taps[w]
        channels = tl.where(first + i < stop, width, 0)
        if d_last is not None:
            j = first + i - (stop - (W - 1))  # in the new state
            m_last = o_p < tl.where(j >= 0, channels, 0)
            p_last = d_last + i_state + o_p * (W - 1) + j
            b_dx += tl.load(p_last, mask=m_last, other=0).to(tl.float32)
        tl.store(p_dx, b_dx.to(d_x.dtype.element_ty), mask=o_p < channels)
        p_dx += width
    if d_past is not None:  # settled when it is compiled  # noqa: SIM102
        if first == start:
            last = None if d_last is None else d_last + i_state
            backpropagate_to_state(
                d_z, taps, last, d_past + i_state, o_p, width, stop - start, W
            )  # fmt: skip
    added = ()
    for w in tl.static_range(W):
        b_dtap = tl.zeros_like(sums[w])
        for i in tl.static_range(BT):
            b_dtap += d_z[i] * rows[i + w].to(tl.float32)
        added += (sums[w] + b_dtap,)
    return added


@triton.jit(
    do_not_specialize=[
        "blocks", "num_turns", "num_tiles", "length", "tiles_each", "num_sequences", "num_tokens"
    ]
)  # fmt: skip
def short_conv_backward_kernel(
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
    d_q_y,  # [M, q_width], rows d_q_row apart
    d_k_y,  # [M, k_width]
    d_v_y,  # [M, v_width]
    d_q_last,  # [N, q_width, W - 1] or None
    d_k_last,  # [N, k_width, W - 1] or None
    d_v_last,  # [N, v_width, W - 1] or None
    cu_seqlens,  # [N + 1], where PACKED
    tile_offsets,  # [N + 1], where PACKED
    # outputs
    d_q,  # [M, q_width]
    d_k,  # [M, k_width]
    d_v,  # [M, v_width]
    d_q_past,  # [N, q_width, W - 1] or None
    d_k_past,  # [N, k_width, W - 1] or None
    d_v_past,  # [N, v_width, W - 1] or None
    partials,  # [ranges of tiles, q_width + k_width + v_width, W] fp32
    # sizes
    blocks,  # of channels, of all inputs
    num_turns,  # tiles of a program
    num_tiles,
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
    d_q_row,
    d_k_row,
    d_v_row,
    # meta
    W: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,  # N, padded to a power of two
    PACKED: tl.constexpr,
):
    """Run num_turns tiles; the id is (range of tiles, block of channels), last fastest."""
    i_r = tl.program_id(0) // blocks
    i_s, i_p = locate_channels(blocks, q_width, k_width, BP)
    x = of_stream(i_s, q, k, v)
    past = None if q_past is None else of_stream(i_s, q_past, k_past, v_past)
    d_y = of_stream(i_s, d_q_y, d_k_y, d_v_y)
    d_last = None if d_q_last is None else of_stream(i_s, d_q_last, d_k_last, d_v_last)
    d_x = of_stream(i_s, d_q, d_k, d_v)
    d_past = None if q_past is None else of_stream(i_s, d_q_past, d_k_past, d_v_past)
    width = of_stream(i_s, q_width, k_width, v_width)
    row = of_stream(i_s, q_row, k_row, v_row)
    d_row = of_stream(i_s, d_q_row, d_k_row, d_v_row)
    o_p = i_p * BP + tl.arange(0, BP)
    taps = load_taps(of_stream(i_s, q_weight, k_weight, v_weight), o_p, width, W)
    sums = ()
    for _ in tl.static_range(W):
        sums += (tl.zeros([BP], tl.float32),)
    for i_t in range(i_r * num_turns, tl.minimum((i_r + 1) * num_turns, num_tiles)):
        i_n, start, stop, first = locate_tile(
            i_t, cu_seqlens, tile_offsets,
            length, tiles_each, num_sequences, num_tokens, BT, BN, PACKED,
        )  # fmt: skip
        sums = backpropagate_tile(
            sums, taps, x, past, d_y, d_last, d_x, d_past, width, row, d_row,
            o_p, i_n, start, stop, first, W, BT,
        )  # fmt: skip
    channels_before = of_stream(i_s, 0, q_width, q_width + k_width)
    partials += (i_r.to(tl.int64) * (q_width + k_width + v_width) + channels_before) * W
    for w in tl.static_range(W):
        tl.store(partials + o_p * W + w, sums[w], mask=o_p < width)


def short_conv_backward(
    call: Call, d_ys: tuple[Tensor, ...], d_states: tuple[Tensor, ...] | None
) -> tuple[Gradients, ...]:
    """Return the gradients of a call for one launch, with at least one token.

    Args:
        call: what ran forward.
        d_ys: [B, T, P] of each stream.
        d_states: [N, P, W - 1] of each stream's new state; None if nothing came from them.
    """
    tiles = tiles_of(call, _BLOCK_TOKENS)
    inputs, d_rows = [as_rows(stream.x) for stream in call.streams], [as_rows(d_y) for d_y in d_ys]
    BP, blocks = block_channels(inputs, per_thread=_CHANNELS_PER_THREAD, num_warps=_NUM_WARPS)
    num_turns = triton.cdiv(tiles.total * blocks, _PROGRAMS)
    num_ranges = triton.cdiv(tiles.total, num_turns)
    widths = [x.shape[1] for x in inputs]
    partials = torch.empty(
        (num_ranges, sum(widths) * call.W), dtype=torch.float32, device=call.device
    )
    d_inputs = [_empty_like(stream.x) for stream in call.streams]
    d_pasts = [None if s.state is None else _empty_like(s.state) for s in call.streams]
    with launching_on(call.device):
        short_conv_backward_kernel[(num_ranges * blocks,)](
            *per_stream(inputs),
            *per_stream([stream.weight.contiguous() for stream in call.streams]),
            *per_stream([_contiguous(stream.state) for stream in call.streams]),
            *per_stream(d_rows),
            *per_stream([d_state.contiguous() for d_state in d_states or ()]),
            *(call.cu_seqlens, tiles.offsets),
            *per_stream(d_inputs),
            *per_stream(d_pasts),
            partials,
            *(blocks, num_turns, tiles.total, call.T, tiles.each, call.N, inputs[0].shape[0]),
            *per_stream(widths, missing=0),
            *per_stream([x.stride(0) for x in inputs], missing=0),
            *per_stream([d_y.stride(0) for d_y in d_rows], missing=0),
            W=call.W,
            BT=tiles.size,
            BP=BP,
            BN=tiles.padded_sequences,
            PACKED=call.cu_seqlens is not None,
            num_warps=_NUM_WARPS,
        )
    return _gradients(call, d_inputs, d_pasts, partials)


def _gradients(
    call: Call, d_inputs: list[Tensor], d_pasts: list[Tensor | None], partials: Tensor
) -> tuple[Gradients, ...]:
    """Add up the partial sums [ranges, channels of all streams * W], and deal them out."""
    sizes = [stream.weight.numel() for stream in call.streams]
    sums = add_rows(partials, torch.float32).split(sizes)
    return tuple(
        Gradients(d_x, total.view_as(stream.weight).to(stream.weight.dtype), d_past)
        for stream, d_x, total, d_past in zip(call.streams, d_inputs, sums, d_pasts, strict=True)
    )


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
