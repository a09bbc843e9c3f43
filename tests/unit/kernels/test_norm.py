"""The norms: their formulas, and the places where they round."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm as torch_rms_norm

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.norm import gated_rms_norm, l2_norm, rms_norm

HALVES = [torch.bfloat16, torch.float16]
EPS = 1e-5


def tensors(dtype=torch.float32, *, shape=(2, 5, 3, 16), size=1.0):
    torch.manual_seed(0)
    x, gate, weight = size * torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    return x.to(dtype), gate.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rms_norm_is_that_of_torch(dtype, shape):
    x, _, weight = tensors(dtype, shape=shape)
    torch.testing.assert_close(rms_norm(x, weight, eps=EPS), torch_rms_norm(x, [16], weight, EPS))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rms_norm_rounds_before_the_weight(dtype):
    x, _, weight = tensors(dtype)
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(dtype)
    found = rms_norm(x, weight, eps=EPS)
    assert torch.equal(found, normed * weight)
    assert not torch.equal(found, torch_rms_norm(wide, [16], weight.float(), EPS).to(dtype))


def test_rms_norm_takes_an_fp32_weight_and_keeps_the_dtype_of_x():
    x, _, weight = tensors(torch.bfloat16)
    found = rms_norm(x, weight.float(), eps=EPS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rms_norm(x, weight, eps=EPS))


def test_gated_rms_norm_is_norm_times_weight_times_sigmoid():
    x, gate, weight = tensors(torch.float64)
    expected = torch_rms_norm(x, [16], weight, EPS) / (1 + (-gate).exp())
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, eps=EPS), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gated_rms_norm_rounds_once_at_the_end(dtype):
    x, gate, weight = tensors(dtype)
    wide = gated_rms_norm(x.float(), gate.float(), weight.float(), eps=EPS)
    assert torch.equal(gated_rms_norm(x, gate, weight, eps=EPS), wide.to(dtype))


def test_l2_norm_adds_eps_to_the_sum_of_squares():
    x, _, _ = tensors(torch.float64, size=1e-3)  # sum of squares 1.6e-5: eps is felt
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(l2_norm(x), expected)
    assert l2_norm(x).norm(dim=-1).max() < 0.99
    torch.testing.assert_close(l2_norm(x, eps=0.0).norm(dim=-1), x.new_ones(x.shape[:-1]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_l2_norm_rounds_once_at_the_end(dtype):
    x, _, _ = tensors(dtype)
    assert torch.equal(l2_norm(x), l2_norm(x.float()).to(dtype))


@pytest.mark.parametrize("size", [1e-12, 1e12], ids=["tiny", "huge"])
def test_norms_stay_finite_far_out(size):
    x, gate, weight = tensors(size=size)
    found = rms_norm(x, weight, eps=EPS), gated_rms_norm(x, gate, weight, eps=EPS), l2_norm(x)
    assert all(torch.isfinite(y).all() for y in found)


def test_zero_stays_zero():
    x, gate, weight = tensors(size=0.0)
    found = rms_norm(x, weight, eps=EPS), gated_rms_norm(x, gate, weight, eps=EPS), l2_norm(x)
    assert all(torch.equal(y, torch.zeros_like(y)) for y in found)


def test_gradients_are_those_of_finite_differences():
    x, gate, weight = (t.requires_grad_() for t in tensors(torch.float64, shape=(2, 4)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, g, w: gated_rms_norm(x, g, w, eps=EPS), (x, gate, weight)
    )
    assert torch.autograd.gradcheck(l2_norm, (x,))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda x, _gate, w: rms_norm(x, w[:3], eps=EPS)),
        ("weight", lambda x, _gate, w: rms_norm(x, w.long(), eps=EPS)),
        ("gate", lambda x, gate, w: gated_rms_norm(x, gate[:1], w, eps=EPS)),
        ("weight", lambda x, gate, w: gated_rms_norm(x, gate, w[None], eps=EPS)),
        ("weight", lambda x, gate, w: gated_rms_norm(x, gate, w.to("meta"), eps=EPS)),
        ("x", lambda x, _gate, _w: l2_norm(x[..., :0])),
        ("x", lambda x, _gate, _w: l2_norm(x.int())),
    ],
)
def test_bad_argument_is_named(name, call):
    with pytest.raises(KernelInputError, match=f"^{name} "):
        call(*tensors())
