"""Tensors as the rows of a kernel: their last dim is whole, and rows may lie apart."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [M, D] whose rows are contiguous and equally far apart.

    A slice of the last dim, as of a merged projection, stays a view; what does not fit is copied.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
