"""The Triton norms, joined to autograd: the forward pass keeps its inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_convert.kernels.norm.kernel import Norm, norm_backward, norm_forward


def norm_triton(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, *, eps: float, divisor: int
) -> Tensor:
    """Norm checked tensors [..., D]; divisor makes the sum of squares a mean, or is 1."""
    norm = Norm(eps=eps, divisor=divisor)
    tensors = [tensor for tensor in (x, weight, gate) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Norm.apply(x, weight, gate, norm)
    return norm_forward(x, weight, gate, norm)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (autograd's)
        x: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        norm: Norm,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.norm = norm
        return norm_forward(x, weight, gate, norm)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable)
        ctx: Any,  # noqa: ANN401  (autograd's)
        d_y: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        return (*norm_backward(x, weight, gate, d_y, ctx.norm), None)
