"""Gradients of the Triton form of `chunk_kda`, against the recurrence in fp64.

The bound is twice the error of the recurrence in torch, by autograd, with every operand of a
product and its gradient rounded to the dtype; what is below its smallest number counts as lost.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kimi_convert.kernels.kda import Gate, chunk_kda
from kimi_convert.kernels.kda.reference import recurrent_kda_reference
from tests.unit.kernels.devices import DEVICE, DTYPES
from tests.unit.kernels.kda.cases import make_inputs

pytest.importorskip("triton")
# See test_chunk_triton.py.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
NAMES = ("q", "k", "v", "g", "beta", "state")


class RoundBoth(torch.autograd.Function):
    """Rounds a value to a dtype, and the gradient on its way back."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def rounded_recurrence(q, k, v, g, beta, state, dtype):
    """The recurrence in fp32 whose products have operands and gradients of a dtype."""
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp().unsqueeze(-1)
        read = torch.einsum("bhkv,bhk->bhv", RoundBoth.apply(state, dtype), k[:, t])
        delta = RoundBoth.apply(beta[:, t, :, None] * (v[:, t] - read), dtype)
        state = state + k[:, t].unsqueeze(-1) * delta.unsqueeze(-2)
        query = q[:, t] * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("bhkv,bhk->bhv", RoundBoth.apply(state, dtype), query))
    return RoundBoth.apply(torch.stack(outputs, 1), dtype), state


def case(kind, T, dtype, **shape):
    """Inputs and a state; gate and state in fp32."""
    inputs = make_inputs(kind, T, **shape)
    (B, _, H, K), V = inputs.q.shape, inputs.v.shape[-1]
    tensors = [*inputs.to(dtype)._replace(g=inputs.g), torch.randn(B, H, K, V)]
    return [x.to(DEVICE) for x in tensors]


def directions(inputs):
    """What the outputs and the final state are weighted with."""
    v, state = inputs[2], inputs[-1]
    generator = torch.Generator().manual_seed(7)
    weights = (torch.randn(x.shape, generator=generator) for x in (v, state))
    return [w.to(v.dtype).float().to(DEVICE) for w in weights]


def gradients(run, inputs, dtype):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    for_output, for_state = directions(inputs)
    output, state = run(*leaves)
    loss = (output * for_output.to(output.dtype)).sum(dtype=torch.float64)
    loss = loss + (state * for_state).sum(dtype=torch.float64)
    return torch.autograd.grad(loss, leaves)


def triton(q, k, v, g, beta, state, **options):
    return chunk_kda(q, k, v, g, beta, initial_state=state, backend="triton", **options)


def check(inputs, dtype):
    scale = inputs[0].shape[-1] ** -0.5

    def plain(*leaves):
        return recurrent_kda_reference(*leaves[:5], scale=scale, state=leaves[5])

    found = gradients(triton, inputs, None)
    rounded = gradients(lambda *x: rounded_recurrence(*x, dtype), inputs, torch.float32)
    expected = gradients(plain, inputs, torch.float64)
    floor = 3 * torch.finfo(dtype).eps
    lost = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # rounds to 0
    for name, x, plain_x, expected_x in zip(NAMES, found, rounded, expected, strict=True):
        assert torch.isfinite(x).all(), name
        for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            allowed = 2 * size(plain_x - expected_x) + floor * size(expected_x) + lost
            assert size(x - expected_x) <= allowed, name


@DTYPE
@pytest.mark.parametrize("kind", ["zero", "weak", "minus-5", "minus-20", "mixed"])
def test_gradients_are_within_twice_the_error_of_torch(kind, dtype):
    check(case(kind, 66, dtype, B=1, H=1), dtype)


@DTYPE
@pytest.mark.parametrize("mean", [0.5, 1.0, 2.5])
def test_gradients_of_gates_add_up_over_tokens_as_well_as_torchs(mean, dtype):
    # Keys that are all alike, as softmax features are: what pairs give to one token and take from
    # another is far more than what is left, which a gate's bias gets the sum of.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 64, 1, 64, generator=generator) for _ in range(3))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    g = -2 * mean * torch.rand(q.shape, generator=generator)
    beta, state = torch.rand(1, 64, 1, generator=generator), torch.zeros(1, 1, 64, 64)
    inputs = [x.to(DEVICE) for x in (*(y.to(dtype) for y in (q, k, v)), g, beta.to(dtype), state)]

    def plain(*leaves):
        return recurrent_kda_reference(*leaves[:5], scale=64**-0.5, state=leaves[5])

    found = gradients(triton, inputs, None)[3].double().sum(1)
    rounded = gradients(lambda *x: rounded_recurrence(*x, dtype), inputs, torch.float32)[3]
    expected = gradients(plain, inputs, torch.float64)[3].sum(1)
    error = (found - expected).square().mean().sqrt()
    assert error <= 2 * (rounded.double().sum(1) - expected).square().mean().sqrt()


@DTYPE
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65])
def test_gradients_of_any_length(T, dtype):
    check(case("mixed", T, dtype, B=1, H=1), dtype)


@DTYPE
@pytest.mark.parametrize("shape", [(16, 16), (40, 24), (72, 72)], ids=str)
def test_gradients_of_any_width(shape, dtype):
    K, V = shape
    check(case("weak", 33, dtype, B=1, H=1, K=K, V=V), dtype)


@DTYPE
def test_fused_options_and_shared_heads_have_gradients(dtype):
    B, T, H, HV, K, V = 1, 40, 1, 2, 16, 24
    q, k = torch.randn(2, B, T, H, K)
    v, f, beta = torch.randn(B, T, HV, V), torch.randn(B, T, HV, K), torch.randn(B, T, HV)
    A_log, dt_bias = torch.rand(HV), torch.randn(HV, K) - 2
    inputs = [x.to(dtype).to(DEVICE) for x in (q, k, v, f, beta)]
    gate = [x.to(DEVICE) for x in (A_log, dt_bias)]

    def run(wide, backend):
        leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in (*inputs, *gate)]
        output, _ = chunk_kda(
            *leaves[:5],
            gate=Gate(A_log=leaves[5], dt_bias=leaves[6]),
            qk_norm=True,
            beta_logits=True,
            backend=backend,
        )
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
        return torch.autograd.grad((output * weights).sum(), leaves)

    for found, expected in zip(run(None, "triton"), run(torch.float64, "torch"), strict=True):
        error = (found.double() - expected).square().mean().sqrt()
        assert error <= 10 * torch.finfo(dtype).eps * expected.square().mean().sqrt()


@DTYPE
def test_gradients_of_packed_sequences_are_those_of_each_alone(dtype):
    lengths = [0, 17, 1, 65]
    inputs = case("mixed", sum(lengths), dtype, B=1, H=1)
    inputs[-1] = torch.randn(len(lengths), 1, 16, 24, device=DEVICE)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    found = gradients(lambda *x: triton(*x, cu_seqlens=cu_seqlens), inputs, None)
    for_output, for_state = directions(inputs)
    for n, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            assert torch.equal(found[-1][n], for_state[n])
            continue
        leaves = [x[:, start:stop].detach().requires_grad_() for x in inputs[:-1]]
        state = inputs[-1][n : n + 1].detach().requires_grad_()
        output, last = triton(*leaves, state)
        seeds = (for_output[:, start:stop].to(output.dtype), for_state[n : n + 1])
        alone = torch.autograd.grad((output, last), (*leaves, state), seeds)
        for x, expected in zip(found[:-1], alone, strict=False):
            assert torch.equal(x[:, start:stop], expected)
        assert torch.equal(found[-1][n : n + 1], alone[-1])


@DTYPE
def test_two_runs_are_equal_and_every_element_is_written(monkeypatch, dtype):
    inputs = case("minus-20", 66, dtype, B=1, H=1)
    first = gradients(triton, inputs, None)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device)
    )
    assert all(map(torch.equal, first, gradients(triton, inputs, None)))


def test_gradients_of_one_result_alone():
    inputs = case("weak", 20, torch.float32, B=1, H=1)
    leaves = [x.requires_grad_() for x in inputs]
    output, state = triton(*leaves)
    q, first = torch.autograd.grad(state.sum(), (leaves[0], leaves[-1]), retain_graph=True)
    assert q.eq(0).all()
    assert first.ne(0).any()
    assert torch.autograd.grad(output.sum(), leaves[0])[0].ne(0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["weak", "minus-20", "mixed"])
@pytest.mark.parametrize("T", [64, 1000])
@DTYPE
def test_gradients_of_wide_heads_on_a_gpu(kind, T, dtype):
    check(case(kind, T, dtype, B=2, H=2, K=128, V=128), dtype)
