"""The stages of `chunk_kda` in CUDA C++, on a GPU; the bounds are those of the Triton form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import Gate, chunk_kda
from tests.unit.kernels.devices import DEVICE
from tests.unit.kernels.kda import test_chunk_triton as forward
from tests.unit.kernels.kda import test_chunk_triton_gradients as backward
from tests.unit.kernels.kda.cases import GATES, LENGTHS, make_inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps
WIDE = {"K": 128, "V": 128}
LAWS = pytest.mark.parametrize("law", ["softplus", "bounded", "precomputed"])
INPUTS_SINGLE = pytest.mark.parametrize("single", [False, True], ids=["bf16", "fp32-gates"])


def cuda(inputs, **options):
    return chunk_kda(*inputs, **options, backend="cuda")


def case(kind, T, *, B=1, H=2, **more):
    return forward.case(kind, T, BF16, B=B, H=H, **WIDE, **more)


def on_gpu(inputs):
    return type(inputs)(*(x.to(DEVICE) for x in inputs))


def raw_inputs(law, *, B=1, T=130, H=2, HV=2, single=False):
    """Inputs before norms, gate and sigmoid; the gate's parameters. q and k tiny to huge."""
    q, k = (10 ** torch.randn(2, B, T, H, 1)) * torch.randn(2, B, T, H, 128)
    v, f, beta = torch.randn(B, T, HV, 128), torch.randn(B, T, HV, 128), torch.randn(B, T, HV)
    if law == "precomputed":
        f = -f.abs()
    inputs = [x.to(BF16).to(DEVICE) for x in (q, k, v, f, beta)]
    if single:
        inputs[3], inputs[4] = inputs[3].float(), inputs[4].float()
    A_log, dt_bias = torch.rand(HV), torch.randn(HV, 128) - 2
    return inputs, [A_log.to(DEVICE), dt_bias.to(DEVICE)]


def gate_of(law, A_log, dt_bias):
    if law == "precomputed":
        return None
    return Gate(A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0 if law == "bounded" else None)


def relative(found, expected):
    found, expected = found.double(), expected.double()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("T", LENGTHS)
def test_error_is_within_twice_that_of_torch(kind, T):
    inputs = case(kind, T)
    forward.check(cuda(on_gpu(inputs)), inputs, BF16)


@pytest.mark.parametrize("kind", ["mixed", "weak"])
@pytest.mark.parametrize("V", [16, 40, 64, 256])
def test_any_width_of_values(V, kind):
    inputs = forward.case(kind, 100, BF16, B=3, H=2, K=128, V=V)
    forward.check(cuda(on_gpu(inputs)), inputs, BF16)


def test_keys_that_are_alike_lose_no_more_than_in_torch():
    inputs = case("weak", 128, similar=3.0)
    forward.check(cuda(on_gpu(inputs)), inputs, BF16)


def test_starts_from_a_state_and_leaves_it_alone():
    inputs = case("weak", 100, B=3)
    state = torch.randn(3, 2, 128, 128, device=DEVICE)
    kept = state.clone()
    found = cuda(on_gpu(inputs), initial_state=state)
    forward.check(found, inputs, BF16, state=state)
    assert torch.equal(state, kept)


@LAWS
@INPUTS_SINGLE
@pytest.mark.parametrize("HV", [2, 4])
def test_fused_options_equal_the_same_steps_in_torch(law, single, HV):
    inputs, parameters = raw_inputs(law, HV=HV, single=single)
    options = {"qk_norm": True, "beta_logits": True}
    wide = gate_of(law, *(x.double() for x in parameters))
    expected = chunk_kda(*(x.double() for x in inputs), gate=wide, **options, backend="torch")
    found = cuda(inputs, gate=gate_of(law, *parameters), **options)
    for found_x, expected_x in zip(found, expected, strict=True):
        assert relative(found_x, expected_x) <= 8 * EPS  # roundings of operands along the way


@pytest.mark.parametrize("kind", ["mixed", "weak"])
def test_packed_sequences_equal_one_after_another(kind):
    lengths = [0, 1, 64, 0, 65, 17, 200, 0]
    inputs = on_gpu(case(kind, sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    state = torch.randn(len(lengths), 2, 128, 128, device=DEVICE)
    output, states = cuda(inputs, cu_seqlens=bounds.to(DEVICE), initial_state=state)
    for n, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start == stop:
            assert torch.equal(states[n], state[n])
            continue
        alone = cuda(inputs.tokens(start, stop), initial_state=state[n : n + 1])
        assert torch.equal(output[:, start:stop], alone[0])
        assert torch.equal(states[n : n + 1], alone[1])


@pytest.mark.parametrize("kind", ["weak", "mixed", "minus-20"])
def test_two_runs_are_equal_and_every_element_is_written(monkeypatch, kind):
    inputs = on_gpu(case(kind, 140, B=2))
    first = cuda(inputs)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(made):
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    assert all(map(torch.equal, first, cuda(inputs)))


def test_a_nan_shows():
    for name in range(5):
        inputs = list(on_gpu(case("weak", 100)))
        inputs[name][0, 3] = torch.nan
        output, state = cuda(inputs)
        assert output[0, 3].isnan().any()
        assert name == 0 or state.isnan().any()


@pytest.mark.parametrize("kind", ["zero", "weak", "minus-5", "minus-20", "mixed"])
@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 300])
def test_gradients_are_within_twice_the_error_of_torch(monkeypatch, kind, T):
    monkeypatch.setattr(
        backward,
        "triton",
        lambda *x, **more: chunk_kda(*x[:5], initial_state=x[5], backend="cuda", **more),
    )
    backward.check(backward.case(kind, T, BF16, B=2, H=2, **WIDE), BF16)


@LAWS
@INPUTS_SINGLE
def test_gradients_through_norms_gates_and_sigmoid(law, single):
    inputs, parameters = raw_inputs(law, B=2, T=150, single=single)

    def run(wide, backend):
        leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in (*inputs, *parameters)]
        output, state = chunk_kda(
            *leaves[:5],
            gate=gate_of(law, *leaves[5:]),
            qk_norm=True,
            beta_logits=True,
            backend=backend,
        )
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
        loss = (output * weights).sum(dtype=torch.float64) + (state * 0.1).sum(dtype=torch.float64)
        kept = leaves[:5] if law == "precomputed" else leaves
        return torch.autograd.grad(loss, kept)

    names = ("q", "k", "v", "f", "beta", "A_log", "dt_bias")
    found, expected = run(None, "cuda"), run(torch.float64, "torch")
    for name, x, y in zip(names, found, expected, strict=False):
        assert relative(x, y) <= 10 * EPS, name


@pytest.mark.parametrize("kind", ["weak", "mixed"])
def test_gradients_of_packed_sequences_are_those_of_each_alone(kind):
    lengths = [0, 17, 1, 130, 64]
    inputs = [x.requires_grad_() for x in on_gpu(case(kind, sum(lengths)))]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    output, states = cuda(inputs, cu_seqlens=bounds)
    seeds = torch.randn_like(output), torch.randn_like(states)
    found = torch.autograd.grad((output, states), inputs, seeds)
    for n, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start == stop:
            continue
        leaves = [x[:, start:stop].detach().requires_grad_() for x in inputs]
        alone = torch.autograd.grad(
            cuda(leaves), leaves, (seeds[0][:, start:stop], seeds[1][n : n + 1])
        )
        for x, expected in zip(found, alone, strict=True):
            assert torch.equal(x[:, start:stop], expected)


@pytest.mark.parametrize("kind", ["weak", "mixed"])
def test_two_backward_runs_are_equal_and_every_element_is_written(monkeypatch, kind):
    inputs = [x.requires_grad_() for x in on_gpu(case(kind, 140, B=2))]

    def run():
        output, state = cuda(inputs)
        return torch.autograd.grad((output.float().sum() + state.sum()), inputs)

    first = run()
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(made):
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda x: x._replace(v=x.v.half()), "bf16", id="dtype"),
        pytest.param(lambda x: type(x)(*(y[..., :64] for y in x[:4]), x.beta), "128", id="width"),
    ],
)
def test_what_the_stages_do_not_serve_is_refused_or_left_to_triton(change, expected):
    inputs = change(on_gpu(case("weak", 10)))
    with pytest.raises(KernelInputError, match="CUDA stages") as caught:
        cuda(inputs)
    assert expected in caught.value.expected
    assert torch.isfinite(chunk_kda(*inputs)[0]).all()


def test_a_graph_replays_the_call():
    inputs = on_gpu(make_inputs("weak", 100, H=2, **WIDE).to(BF16))
    expected = cuda(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda(inputs)
    graph.replay()
    assert all(map(torch.equal, found, expected))
