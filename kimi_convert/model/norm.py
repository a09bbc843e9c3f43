"""RMSNorm with a weight per feature, as every block, latent and output head uses it."""

from __future__ import annotations

import torch
from torch import nn

from kimi_convert.kernels.norm import rms_norm
from kimi_convert.model.backend import KernelModule


class RmsNorm(KernelModule):
    """x / sqrt(mean x^2 + eps), rounded to the input's dtype, then times the weight."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        """Allocate the weight; its values come from a checkpoint."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of x [..., size]."""
        return rms_norm(x, self.weight, eps=self.eps, backend=self.backend)
