"""The gate laws: their formulas, their ranges, and what happens far out."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import bounded_gate, softplus_gate


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    f, A_log, dt_bias = torch.randn(2, 7, 3, 4), torch.randn(3), torch.randn(3, 4)
    return f.to(dtype), A_log.to(dtype), dt_bias.to(dtype)


def per_channel(law, f, A_log, dt_bias):
    return torch.tensor(
        [
            [[[law(x, a, b) for x, b in zip(xs, bs, strict=True)]
              for xs, a, bs in zip(token, A_log.tolist(), dt_bias.tolist(), strict=True)]
             for token in sequence]
            for sequence in f.tolist()
        ],
        dtype=torch.float64,
    )  # fmt: skip


def test_softplus_gate_is_its_formula_per_channel():
    arguments = parameters(torch.float64)
    expected = per_channel(lambda x, a, b: -math.exp(a) * math.log1p(math.exp(x + b)), *arguments)
    torch.testing.assert_close(softplus_gate(*arguments), expected)


def test_bounded_gate_is_its_formula_per_channel():
    arguments = parameters(torch.float64)
    expected = per_channel(lambda x, a, b: -5 / (1 + math.exp(-math.exp(a) * (x + b))), *arguments)
    torch.testing.assert_close(bounded_gate(*arguments, lower_bound=-5.0), expected)


def gates():
    return [softplus_gate, lambda *x: bounded_gate(*x, lower_bound=-5.0)]


@pytest.mark.parametrize("gate", gates(), ids=["softplus", "bounded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_projections_give_fp32_gates(gate, dtype):
    f, A_log, dt_bias = parameters()
    found = gate(f.to(dtype), A_log, dt_bias)
    assert found.dtype == torch.float32
    assert torch.equal(found, gate(f.to(dtype).float(), A_log, dt_bias))


@pytest.mark.parametrize("gate", gates(), ids=["softplus", "bounded"])
def test_extreme_projections_stay_finite_and_never_grow_the_state(gate):
    _, A_log, dt_bias = parameters()
    f = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    g = gate(f.view(1, -1, 1, 1).expand(1, 7, 3, 4).requires_grad_(), A_log, dt_bias)
    assert torch.isfinite(g).all()
    assert (g <= 0).all()


def test_open_softplus_gate_keeps_its_digits():
    # log(1 + exp(x)) is 0 in fp32 below -17; the gate must not be.
    g = softplus_gate(torch.full((1, 1, 1, 1), -20.0), torch.zeros(1), torch.zeros(1, 1))
    torch.testing.assert_close(g.item(), -math.exp(-20), rtol=1e-6, atol=0)


def test_bounded_gate_stays_above_its_bound():
    f, A_log, dt_bias = parameters()
    g = bounded_gate(100 * f, A_log, dt_bias, lower_bound=-5.0)
    assert g.min() >= -5
    assert g.min() < -4.9


@pytest.mark.parametrize("gate", gates(), ids=["softplus", "bounded"])
def test_gradients_are_those_of_finite_differences(gate):
    leaves = [x.requires_grad_() for x in parameters(torch.float64)]
    assert torch.autograd.gradcheck(gate, leaves)


@pytest.mark.parametrize("gate", gates(), ids=["softplus", "bounded"])
@pytest.mark.parametrize(
    ("place", "name", "change"),
    [
        (0, "f", lambda x: x.flatten(2)),
        (1, "A_log", lambda x: x.view(1, 1, 3, 1)),
        (2, "dt_bias", lambda x: x.flatten()),
        (2, "dt_bias", lambda x: x.T),
        (1, "A_log", lambda x: x.to("meta")),
        (1, "A_log", lambda x: x.int()),
    ],
)
def test_bad_argument_is_named(gate, place, name, change):
    arguments = list(parameters())
    arguments[place] = change(arguments[place])
    with pytest.raises(KernelInputError, match=f"^{name} "):
        gate(*arguments)


@pytest.mark.parametrize("lower_bound", [0.0, 5.0, math.nan])
def test_lower_bound_must_be_below_0(lower_bound):
    with pytest.raises(KernelInputError, match="lower_bound"):
        bounded_gate(*parameters(), lower_bound=lower_bound)
