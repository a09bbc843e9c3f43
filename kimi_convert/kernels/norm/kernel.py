"""The norms on Triton: one kernel forward, one backward, for all three.

With n = x r, r = 1 / sqrt(sum(x^2) / divisor + eps), s = sigmoid(gate), and w or s of 1 where
there is none,

    y     = n w s
    dn    = dy w s
    dx    = r (dn - n sum(dn n) / divisor)
    dgate = dy n w s (1 - s)
    dw    = sum over rows of dy n s

A program holds whole rows. What the forward pass knows is computed again: x is read anyway.
"""

# pyright: reportPossiblyUnboundVariable=false
# Kernels ask `is not None` of their arguments twice; both are settled when they are compiled.
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.backend import launching_on
from kimi_convert.kernels.partial_sums import add_rows
from kimi_convert.kernels.rows import as_rows

# Elements of a program, and programs of the backward pass: each adds up the weight's gradient over
# its rows. Not measured yet.
_TILE = 2048
_BACKWARD_PROGRAMS = 528  # 4 for each multiprocessor of an H200


class Norm(NamedTuple):
    """Which norm."""

    eps: float
    divisor: int  # D for a mean of squares, 1 for their sum


class _Tiling(NamedTuple):
    """How rows [M, D] are dealt to programs."""

    rows: int  # of a tile
    width: int  # D, padded to a power of two
    num_tiles: int
    num_warps: int


@triton.jit
def norm_rows(x, eps, DIVISOR: tl.constexpr):
    """Return n and r of rows x [R, D] fp32, where lanes past D hold 0."""
    r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIVISOR + eps)
    return x * r, r


@triton.jit(do_not_specialize=["num_rows"])
def norm_forward_kernel(
    # inputs
    x,  # [M, D], rows x_row apart
    weight,  # [D] or None
    gate,  # [M, D], rows gate_row apart, or None
    # outputs
    y,  # [M, D]
    # sizes
    num_rows,
    eps,
    # strides, from one row to the next
    x_row,
    gate_row,
    # meta
    D: tl.constexpr,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded to a power of two
):
    """Norm ROWS rows; the program id is the tile. Where nothing gates, n is rounded before w."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < D
    mask = (o_m < num_rows)[:, None] & m_d[None, :]
    b_x = tl.load(x + o_m[:, None] * x_row + o_d[None, :], mask=mask, other=0).to(tl.float32)
    if gate is not None:
        p_gate = gate + o_m[:, None] * gate_row + o_d[None, :]
        b_gate = tl.load(p_gate, mask=mask, other=0).to(tl.float32)
    b_y, _ = norm_rows(b_x, eps, DIVISOR)
    if weight is not None:
        b_weight = tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)
        if gate is None:
            b_y = b_y.to(y.dtype.element_ty).to(tl.float32)
        b_y *= b_weight[None, :]
    if gate is not None:
        b_y *= tl.sigmoid(b_gate)
    p_y = y + o_m[:, None] * D + o_d[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


def norm_forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, norm: Norm) -> Tensor:
    """Return y, shaped as x [..., D]; of x and gate, only rows need be contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    D = x.shape[-1]
    num_rows = x.numel() // D
    tiling = _tiling(num_rows, D)
    x, gate = as_rows(x), None if gate is None else as_rows(gate)
    with launching_on(x.device):
        norm_forward_kernel[(tiling.num_tiles,)](
            x,
            None if weight is None else weight.contiguous(),
            gate,
            y,
            num_rows,
            norm.eps,
            x.stride(0),
            0 if gate is None else gate.stride(0),
            D=D,
            DIVISOR=norm.divisor,
            ROWS=tiling.rows,
            WIDTH=tiling.width,
            num_warps=tiling.num_warps,
        )
    return y


@triton.jit(do_not_specialize=["num_rows", "num_turns"])
def norm_backward_kernel(
    # inputs
    x,  # [M, D], rows x_row apart
    weight,  # [D] or None
    gate,  # [M, D], rows gate_row apart, or None
    d_y,  # [M, D], rows d_y_row apart
    # outputs
    d_x,  # [M, D]
    d_weight,  # [programs, D] fp32 or None, sums over the rows of a program
    d_gate,  # [M, D] or None
    # sizes
    num_rows,
    num_turns,
    eps,
    # strides, from one row to the next
    x_row,
    gate_row,
    d_y_row,
    # meta
    D: tl.constexpr,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded to a power of two
):
    """Go through num_turns tiles of ROWS rows each, next to each other; the program id is theirs."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < D
    if weight is not None:
        b_weight = tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
        b_dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    for turn in range(num_turns):
        o_m = (i_p * num_turns + turn) * ROWS + tl.arange(0, ROWS)
        mask = (o_m < num_rows)[:, None] & m_d[None, :]
        p_md = o_m[:, None] * D + o_d[None, :]
        p_x = x + o_m[:, None] * x_row + o_d[None, :]
        p_dy = d_y + o_m[:, None] * d_y_row + o_d[None, :]
        b_x = tl.load(p_x, mask=mask, other=0).to(tl.float32)
        b_dn = tl.load(p_dy, mask=mask, other=0).to(tl.float32)
        if gate is not None:
            p_gate = gate + o_m[:, None] * gate_row + o_d[None, :]
            b_gate = tl.sigmoid(tl.load(p_gate, mask=mask, other=0).to(tl.float32))
        b_n, r = norm_rows(b_x, eps, DIVISOR)
        if gate is not None:
            b_dgate = b_dn * b_n * b_weight * b_gate * (1 - b_gate)
            tl.store(d_gate + p_md, b_dgate.to(d_gate.dtype.element_ty), mask=mask)
            b_dn *= b_gate
        if weight is not None:
            b_dweight += b_dn * b_n
            b_dn *= b_weight
        b_dx = r * (b_dn - b_n * (tl.sum(b_dn * b_n, 1, keep_dims=True) / DIVISOR))
        tl.store(d_x + p_md, b_dx.to(d_x.dtype.element_ty), mask=mask)
    if weight is not None:
        tl.store(d_weight + i_p * D + o_d, tl.sum(b_dweight, 0), mask=m_d)


def norm_backward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, d_y: Tensor, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and gate; of x, gate and d_y, rows must be contiguous alone."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    if x.numel() == 0:
        return d_x, None if weight is None else torch.zeros_like(weight), d_gate
    D = x.shape[-1]
    num_rows = x.numel() // D
    tiling = _tiling(num_rows, D)
    num_turns = 1 if weight is None else triton.cdiv(tiling.num_tiles, _BACKWARD_PROGRAMS)
    num_programs = triton.cdiv(tiling.num_tiles, num_turns)
    partials = None
    if weight is not None:
        partials = torch.empty((num_programs, D), dtype=torch.float32, device=x.device)
    x, d_y, gate = as_rows(x), as_rows(d_y), None if gate is None else as_rows(gate)
    with launching_on(x.device):
        norm_backward_kernel[(num_programs,)](
            x,
            None if weight is None else weight.contiguous(),
            gate,
            d_y,
            d_x,
            partials,
            d_gate,
            num_rows,
            num_turns,
            norm.eps,
            x.stride(0),
            0 if gate is None else gate.stride(0),
            d_y.stride(0),
            D=D,
            DIVISOR=norm.divisor,
            ROWS=tiling.rows,
            WIDTH=tiling.width,
            num_warps=tiling.num_warps,
        )
    if weight is None or partials is None:
        return d_x, None, d_gate
    return d_x, add_rows(partials, weight.dtype), d_gate


def _tiling(num_rows: int, D: int) -> _Tiling:
    """Deal rows out: many narrow ones to a program, 16 or 32 elements to a thread."""
    width = triton.next_power_of_2(D)
    rows = max(_TILE // width, 1)
    num_warps = min(max(width // 512, 4), 16)
    return _Tiling(rows, width, triton.cdiv(num_rows, rows), num_warps)
