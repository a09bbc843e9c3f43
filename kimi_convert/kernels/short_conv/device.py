"""What the short convolution's kernels share: tiles of tokens, and the loads of one tile.

A tile is BT tokens of one sequence and BP channels. Its rows are loaded one by one, each a vector
[BP], into a tuple that is indexed at compile time: a value is read once, not once per tap.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_tile(
    i_t, cu_seqlens, tile_offsets, length, tiles_each, num_sequences, num_tokens,
    BT: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the sequence of tile i_t of all sequences, its first and last token, and the tile's first.

    The last is exclusive. Every sequence has a tile, be it empty. Where packed sequences have fewer
    tiles than there are programs, the first token of a surplus tile is past the end of the last
    sequence. Offsets outside the tokens are moved inside.
    """
    if PACKED:
        o_n = tl.arange(0, BN)
        ends = tl.load(tile_offsets + 1 + o_n, mask=o_n < num_sequences, other=2147483647)
        i_n = tl.minimum(tl.sum((ends <= i_t).to(tl.int32), 0), num_sequences - 1)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), num_tokens)
        stop = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        stop = tl.minimum(tl.maximum(stop, start), num_tokens)
        first = start + (i_t - tl.load(tile_offsets + i_n)).to(tl.int64) * BT
    else:
        i_n = i_t // tiles_each
        start = i_n.to(tl.int64) * length
        stop = start + length
        first = start + (i_t - i_n * tiles_each).to(tl.int64) * BT
    return i_n, start, stop, first


@triton.jit
def of_stream(i_s, q, k, v):
    """Return q, k or v, as i_s is 0, 1 or 2; they are pointers or numbers, k and v may be None."""
    found = q
    if k is not None:
        found = tl.where(i_s == 1, k, found)
    if v is not None:
        found = tl.where(i_s == 2, v, found)
    return found


@triton.jit
def locate_channels(blocks, q_width, k_width, BP: tl.constexpr):
    """Return which input the program's block of channels is of, and its number there.

    The program id counts the blocks of all inputs fastest.
    """
    q_blocks = (q_width + BP - 1) // BP
    qk_blocks = q_blocks + (k_width + BP - 1) // BP
    i_p = tl.program_id(0) % blocks
    i_s = (i_p >= q_blocks).to(tl.int32) + (i_p >= qk_blocks).to(tl.int32)
    return i_s, i_p - of_stream(i_s, 0, q_blocks, qk_blocks)


@triton.jit
def load_taps(weight, o_p, width, W: tl.constexpr):
    """Load the W taps of channels o_p of weight [P, W], oldest first, in fp32."""
    taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + o_p * W + w, mask=o_p < width, other=0).to(tl.float32),)
    return taps


@triton.jit
def load_rows(
    x, past, t, start, stop, o_p, width, row, W: tl.constexpr, BEFORE: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Load channels o_p of COUNT tokens, oldest first; only the first BEFORE may be before `start`.

    Args:
        x: [M, P], rows `row` apart.
        past: [P, W - 1], what stands before the sequence; None for zeros.
        t: the first token, at least start - (W - 1).
        start: of the sequence.
        stop: of the sequence; zeros from here on.
        o_p: channels; zeros from `width` on.
        width: P.
        row: from one token to the next.
        W: taps.
        BEFORE: rows.
        COUNT: rows.
    """
    rows = ()
    p_x = x + t * row + o_p
    for j in tl.static_range(COUNT):
        # Conditions on the token limit the channels: such a mask stays vectorised.
        if j < BEFORE:
            channels = tl.where((t + j >= start) & (t + j < stop), width, 0)
        else:
            channels = tl.where(t + j < stop, width, 0)
        rows += (tl.load(p_x, mask=o_p < channels, other=0),)
        p_x += row
    if past is not None:
        known = ()
        for j in tl.static_range(COUNT):
            value = rows[j]
            if j < BEFORE:  # settled when it is compiled  # noqa: SIM102
                if t + j < start:
                    p_past = past + o_p * (W - 1) + (t + j - start + W - 1)
                    value = tl.load(p_past, mask=o_p < width, other=0)
            known += (value,)
        rows = known
    return rows
