"""RmsNorm: the formula, and where it rounds."""

from __future__ import annotations

import torch

from kimi_convert.model.norm import RmsNorm


def norm_with(weight: torch.Tensor, eps: float) -> RmsNorm:
    norm = RmsNorm(len(weight), eps=eps, dtype=weight.dtype)
    norm.weight.data.copy_(weight)
    return norm


def test_eps_is_added_to_the_mean_square():
    x, weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([1.0, 2.0])
    expected = x / (12.5 + 0.5) ** 0.5 * weight
    torch.testing.assert_close(norm_with(weight.double(), 0.5)(x), expected)


def test_bf16_is_rounded_before_the_weight():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    weight = torch.randn(32, generator=generator).bfloat16()
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16()
    assert torch.equal(norm_with(weight, 1e-5)(x), normed * weight)
