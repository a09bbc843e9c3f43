"""The norms as formulas, in torch.

All three compute in `dtype`, fp32 or fp64, return the dtype of x, and check nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight, rounded to x's dtype before the weight."""
    return (_over_rms(x.to(dtype), eps=eps).to(x.dtype) * weight).to(x.dtype)


def gated_rms_norm_reference(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate), rounded once at the end."""
    normed = _over_rms(x.to(dtype), eps=eps) * weight.to(dtype)
    return (normed * gate.to(dtype).sigmoid()).to(x.dtype)


def l2_norm_reference(x: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Compute x / sqrt(sum(x^2) + eps)."""
    wide = x.to(dtype)
    return (wide * (wide.square().sum(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _over_rms(x: Tensor, *, eps: float) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
