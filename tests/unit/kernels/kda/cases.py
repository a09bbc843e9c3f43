"""Inputs for KDA tests, and the one rule that bounds the error of every form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kimi_convert.kernels.kda.reference import recurrent_kda_reference

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 1000]
GATES = ["zero", "weak", "minus-5", "minus-20", "mixed", "forget-all"]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def to(self, dtype) -> Inputs:
        return Inputs(*(x.to(dtype) for x in self))

    def tokens(self, start, stop) -> Inputs:
        return Inputs(*(x[:, start:stop] for x in self))


def gate(kind, shape):
    match kind:
        case "zero":
            return torch.zeros(shape)
        case "weak":
            return -0.02 * torch.rand(shape)
        case "minus-5":
            return torch.full(shape, -5.0)
        case "minus-20":
            return torch.full(shape, -20.0)
        case "mixed":  # no decay, hardly any, moderate and strong, side by side in every channel
            values = torch.tensor([0.0, -0.01, -0.7, -20.0])
            return values[torch.randint(4, shape)]
        case "forget-all":
            return torch.where(torch.rand(shape) < 0.05, -torch.inf, -0.1)
    raise AssertionError(kind)


def make_inputs(kind, T, *, B=2, H=3, K=16, V=24, similar=0.0, seed=0):
    """fp32 inputs; `similar` > 0 makes the keys of a head alike, which couples the deltas."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, B, T, H, K)
    beta = torch.full((B, T, H), 0.99) if similar else torch.randn(B, T, H).sigmoid()
    return Inputs(
        normalize(q, dim=-1),
        normalize(k + similar * torch.randn(H, K), dim=-1),
        torch.randn(B, T, H, V),
        gate(kind, (B, T, H, K)),
        beta,
    )


def make_state(inputs):
    (B, _, H, K), V = inputs.q.shape, inputs.v.shape[-1]
    return torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(1))


def zero_state(inputs, dtype=torch.float64):
    (B, _, H, K), V = inputs.q.shape, inputs.v.shape[-1]
    return torch.zeros(B, H, K, V, dtype=dtype)


def oracle(inputs, *, state=None, scale=None):
    """The recurrence in fp64 on exactly the values that the function under test gets."""
    state = zero_state(inputs) if state is None else state.double()
    scale = inputs.q.shape[-1] ** -0.5 if scale is None else scale
    return recurrent_kda_reference(*inputs.to(torch.float64), scale=scale, state=state)


def plain(inputs, *, state=None, scale=None):
    """The recurrence in fp32, rounded to the dtype of v: plain torch without a second thought."""
    state = zero_state(inputs, torch.float32) if state is None else state
    scale = inputs.q.shape[-1] ** -0.5 if scale is None else scale
    output, last = recurrent_kda_reference(*inputs.to(torch.float32), scale=scale, state=state)
    return output.to(inputs.v.dtype), last


def assert_within_twice_plain(found, plain, oracle):
    """Bound the error by twice that of plain torch in the same dtype, plus one rounding.

    Both the largest and the root mean square error count, each relative to the oracle's. The
    rounding is there because plain torch may be right by luck, most of all for one token.
    """
    for found_x, plain_x, oracle_x in zip(found, plain, oracle, strict=True):
        assert found_x.dtype == plain_x.dtype
        assert torch.isfinite(found_x).all()
        floor = torch.finfo(found_x.dtype).eps
        for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            allowed = 2 * size(plain_x - oracle_x) + floor * size(oracle_x)
            assert size(found_x - oracle_x) <= allowed
