"""The second stage of a sum over tokens: partial sums are added in an order that never changes.

The first stage is part of the kernel that makes the terms. Each of its programs writes one row, so
no two runs differ, which atomic additions would not promise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.backend import launching_on

# A tile is 128 bytes wide, and tall, as there are often few columns. Not measured yet.
_TILE_COLUMNS = 32
_TILE_ROWS = 128


@triton.jit(do_not_specialize=["num_rows"])
def add_rows_kernel(
    # inputs
    partials,  # [R, F] fp32
    # outputs
    total,  # [F]
    # sizes
    num_rows,
    num_columns,
    # meta
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Write the sums of TILE_COLUMNS columns; the program id is the tile.

    total_f = sum_r partials_rf in fp32, rounded once. TILE_ROWS rows are added at a time.
    """
    o_f = tl.program_id(0).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    m_f = o_f < num_columns
    b_total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for start in range(0, num_rows, TILE_ROWS):
        o_r = start + tl.arange(0, TILE_ROWS).to(tl.int64)
        m_rf = (o_r < num_rows)[:, None] & m_f[None, :]
        b_total += tl.load(partials + o_r[:, None] * num_columns + o_f[None, :], m_rf, other=0)
    tl.store(total + o_f, tl.sum(b_total, 0).to(total.dtype.element_ty), mask=m_f)


def add_rows(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums [F] in a dtype of the columns of partials [R, F] fp32, contiguous."""
    num_rows, num_columns = partials.shape
    total = torch.empty(num_columns, dtype=dtype, device=partials.device)
    with launching_on(partials.device):
        add_rows_kernel[(triton.cdiv(num_columns, _TILE_COLUMNS),)](
            partials,
            total,
            num_rows,
            num_columns,
            TILE_ROWS=_TILE_ROWS,
            TILE_COLUMNS=_TILE_COLUMNS,
            num_warps=4,
        )
    return total
