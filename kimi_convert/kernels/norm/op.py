"""The public norms: check the arguments, choose the backend, run one of the forms."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.backend import Backend, resolve_backend
from kimi_convert.kernels.checks import expect, expect_precision
from kimi_convert.kernels.norm.reference import (
    gated_rms_norm_reference,
    l2_norm_reference,
    rms_norm_reference,
)

_TRITON_WIDTH = 16384  # of a row: what the registers of a multiprocessor hold


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, backend: Backend | str | None = None
) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight, rounded to x's dtype before the weight.

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64.
        weight: [D]. Multiplied in the wider of the two dtypes.
        eps: Added to the mean square.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        [..., D] in x's dtype.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: `KimiLinearRMSNorm` in transformers, which rounds in the same place.
    """
    expect("rms_norm", x=(x, "... D"), weight=(weight, "D"))
    dtype = expect_precision("rms_norm", x=x, weight=weight)
    if _backend("rms_norm", backend, dtype, x) is Backend.TORCH:
        return rms_norm_reference(x, weight, eps=eps, dtype=dtype)
    from kimi_convert.kernels.norm.autograd import norm_triton

    return norm_triton(x, weight, None, eps=eps, divisor=x.shape[-1])


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, backend: Backend | str | None = None
) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate), rounded once at the end.

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64.
        gate: [..., D], shaped as x. Logits.
        weight: [D].
        eps: Added to the mean square.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        [..., D] in x's dtype.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, section 4 (output gate after the norm).
    """
    expect("gated_rms_norm", x=(x, "... D"), gate=(gate, "... D"), weight=(weight, "D"))
    dtype = expect_precision("gated_rms_norm", x=x, gate=gate, weight=weight)
    if _backend("gated_rms_norm", backend, dtype, x) is Backend.TORCH:
        return gated_rms_norm_reference(x, gate, weight, eps=eps, dtype=dtype)
    from kimi_convert.kernels.norm.autograd import norm_triton

    return norm_triton(x, weight, gate, eps=eps, divisor=x.shape[-1])


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: Backend | str | None = None) -> Tensor:
    """Compute x / sqrt(sum(x^2) + eps).

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64. Pass fp32 to keep the result in fp32.
        eps: Added to the sum of squares, not to the mean.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        [..., D] in x's dtype.

    Raises:
        KernelInputError: The dtype does not fit, or D is 0.

    Source: flash-linear-attention's `l2norm`, which the released checkpoints were trained with.
    """
    expect("l2_norm", x=(x, "... D"))
    dtype = expect_precision("l2_norm", x=x)
    if _backend("l2_norm", backend, dtype, x) is Backend.TORCH:
        return l2_norm_reference(x, eps=eps, dtype=dtype)
    from kimi_convert.kernels.norm.autograd import norm_triton

    return norm_triton(x, None, None, eps=eps, divisor=1)


def _backend(where: str, backend: Backend | str | None, dtype: torch.dtype, x: Tensor) -> Backend:
    """Return what runs; Triton is refused where it is asked for and cannot."""
    chosen = resolve_backend(backend, where=where, device=x.device, dtype=dtype)
    if chosen is Backend.TORCH or x.shape[-1] <= _TRITON_WIDTH:
        return chosen
    if backend is None:
        return Backend.TORCH
    raise KernelInputError(
        "x is too wide for Triton",
        where=where,
        expected=f"[..., D] with D of at most {_TRITON_WIDTH}",
        found=list(x.shape),
        hint='Pass backend="torch", or None to let the call decide.',
    )
