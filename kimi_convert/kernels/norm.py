"""The three normalisations of Kimi-Linear over the last dim.

Each is its own reference: the formula, written once, computed in fp32 (fp64 for fp64 inputs).
They differ in where the result is rounded to the dtype of x, and that is part of the format.
"""

from __future__ import annotations

from torch import Tensor

from kimi_convert.kernels.checks import expect, expect_precision


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight, rounded to x's dtype before the weight.

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64.
        weight: [D]. Multiplied in the wider of the two dtypes.
        eps: Added to the mean square.

    Returns:
        [..., D] in x's dtype.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: `KimiLinearRMSNorm` in transformers, which rounds in the same place.
    """
    expect("rms_norm", x=(x, "... D"), weight=(weight, "D"))
    dtype = expect_precision("rms_norm", x=x, weight=weight)
    return (_over_rms(x.to(dtype), eps=eps).to(x.dtype) * weight).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate), rounded once at the end.

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64.
        gate: [..., D], shaped as x. Logits.
        weight: [D].
        eps: Added to the mean square.

    Returns:
        [..., D] in x's dtype.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, section 4 (output gate after the norm).
    """
    expect("gated_rms_norm", x=(x, "... D"), gate=(gate, "... D"), weight=(weight, "D"))
    dtype = expect_precision("gated_rms_norm", x=x, gate=gate, weight=weight)
    normed = _over_rms(x.to(dtype), eps=eps) * weight.to(dtype)
    return (normed * gate.to(dtype).sigmoid()).to(x.dtype)


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Compute x / sqrt(sum(x^2) + eps).

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64. Pass fp32 to keep the result in fp32.
        eps: Added to the sum of squares, not to the mean.

    Returns:
        [..., D] in x's dtype.

    Raises:
        KernelInputError: The dtype does not fit, or D is 0.

    Source: flash-linear-attention's `l2norm`, which the released checkpoints were trained with.
    """
    expect("l2_norm", x=(x, "... D"))
    wide = x.to(expect_precision("l2_norm", x=x))
    return (wide * (wide.square().sum(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _over_rms(x: Tensor, *, eps: float) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
