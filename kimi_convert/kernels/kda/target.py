"""The check of a tensor that a kernel writes to: it cannot be cast or copied on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError


def check_target(
    where: str,
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse a tensor that a kernel cannot write a result into as it is.

    Raises:
        KernelInputError: the shape, dtype or device differs, or it is not contiguous.
    """
    found = type(tensor).__name__
    if isinstance(tensor, Tensor):
        fits = (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, device)
        if fits and tensor.is_contiguous():
            return
        found = (
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )
    raise KernelInputError(
        f"{name} cannot be written to",
        where=where,
        expected=f"{list(shape)} {dtype} on {device}, contiguous",
        found=found,
        hint=f"Pass {name} as torch.empty makes it.",
    )
