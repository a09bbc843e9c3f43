"""The Triton recurrence: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import Gate, recurrent_kda
from tests.unit.kernels.devices import DEVICE, DTYPES
from tests.unit.kernels.kda.cases import (
    GATES,
    assert_within_twice_plain,
    make_inputs,
    make_state,
    oracle,
    plain,
)

pytest.importorskip("triton")

from kimi_convert.kernels.kda.decode import (
    recurrent_kda_triton,
    recurrent_kda_triton_,
)
from kimi_convert.kernels.kda.device import BOUNDED, PRECOMPUTED, SOFTPLUS

IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


def case(kind, T, dtype, **shape):
    """Inputs in a dtype, the gate in fp32."""
    inputs = make_inputs(kind, T, **shape)
    return inputs.to(dtype)._replace(g=inputs.g)


def moved(values):
    return {
        name: value.to(DEVICE) if torch.is_tensor(value) else value
        for name, value in values.items()
    }


def settings(inputs, options):
    defaults = {"scale": inputs[0].shape[-1] ** -0.5, "qk_norm": False, "law": PRECOMPUTED.value}
    return moved({**defaults, **options})


def triton(inputs, *, state=None, **options):
    inputs = [x.to(DEVICE) for x in inputs]
    state = None if state is None else state.to(DEVICE)
    output, last = recurrent_kda_triton(*inputs, state=state, **settings(inputs, options))
    return output.cpu(), last.cpu()


def triton_(inputs, *, state, **options):
    inputs = [x.to(DEVICE) for x in inputs]
    return recurrent_kda_triton_(*inputs, state=state, **settings(inputs, options)).cpu()


def check(inputs, *, state=None):
    found = triton(inputs, state=state)
    assert_within_twice_plain(found, plain(inputs, state=state), oracle(inputs, state=state))


@DTYPE
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("kind", GATES)
def test_error_is_within_twice_that_of_torch(kind, T, dtype):
    inputs = case(kind, T, dtype, B=1, H=2)
    check(inputs, state=make_state(inputs))


@DTYPE
@pytest.mark.parametrize("T", [15, 16, 17, 63, 64, 65])
def test_any_number_of_tokens(T, dtype):
    inputs = case("mixed", T, dtype, B=1, H=1)
    check(inputs, state=make_state(inputs))


@DTYPE
@pytest.mark.parametrize(
    "shape", [(16, 16), (24, 40), (17, 19), (72, 40), (128, 64), (256, 20)], ids=str
)
def test_any_width_of_keys_and_values(shape, dtype):
    K, V = shape
    inputs = case("weak", 2, dtype, B=1, H=1, K=K, V=V)
    check(inputs, state=make_state(inputs))


@DTYPE
@pytest.mark.parametrize("B", [1, 3])
def test_starts_from_zeros_without_a_state(B, dtype):
    inputs = case("weak", 2, dtype, B=B, H=1)
    check(inputs)
    zeros = torch.zeros_like(make_state(inputs))
    # Compiled apart, the two may order their sums differently.
    for found, expected in zip(triton(inputs), triton(inputs, state=zeros), strict=True):
        bound = 2 * torch.finfo(found.dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() <= bound


@DTYPE
def test_keys_that_are_alike_lose_no_more_than_in_torch(dtype):
    inputs = case("weak", 40, dtype, B=1, H=1, similar=3.0)
    check(inputs, state=make_state(inputs))


@DTYPE
@pytest.mark.parametrize("magnitude", [1e-6, 1e-2, 1e3])
def test_values_and_states_of_any_size(magnitude, dtype):
    inputs = case("mixed", 3, dtype, B=1, H=1)
    inputs = inputs._replace(v=inputs.v * magnitude)
    check(inputs, state=magnitude * make_state(inputs))


@DTYPE
@pytest.mark.parametrize("law", ["softplus", "bounded", "precomputed"])
@pytest.mark.parametrize("groups", [1, 2])
def test_fused_options_are_within_twice_the_error_of_torch(groups, law, dtype):
    B, T, H, K, V = 1, 2, 2, 24, 40
    HV = groups * H
    q, k = (10 ** torch.randn(2, B, T, H, 1)) * torch.randn(2, B, T, H, K)  # tiny and huge
    v, f, beta = torch.randn(B, T, HV, V), torch.randn(B, T, HV, K), torch.randn(B, T, HV)
    if law == "precomputed":
        f = -f.abs()
    inputs = tuple(x.to(dtype) for x in (q, k, v, f, beta))
    state = torch.randn(B, HV, K, V)
    lower_bound = -5.0 if law == "bounded" else None
    A_log, dt_bias = torch.rand(HV), torch.randn(HV, K) - 2
    wide = Gate(A_log=A_log.double(), dt_bias=dt_bias.double(), lower_bound=lower_bound)
    gate = Gate(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
    options = {"qk_norm": True, "beta_logits": True, "scale": 0.3}
    has_gate = law != "precomputed"
    expected = recurrent_kda(
        *(x.double() for x in inputs),
        initial_state=state.double(),
        gate=wide if has_gate else None,
        **options,
    )
    torch_s = recurrent_kda(
        *inputs, initial_state=state, gate=gate if has_gate else None, **options
    )
    laws = {"softplus": SOFTPLUS, "bounded": BOUNDED, "precomputed": PRECOMPUTED}
    if has_gate:
        options |= {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound or 0.0}
    found = triton(inputs, state=state, law=laws[law].value, **options)
    assert_within_twice_plain(found, torch_s, expected)


@DTYPE
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_packed_sequences_equal_one_after_another(offsets, dtype):
    lengths = [0, 1, 3, 0, 2, 0]
    inputs = case("mixed", sum(lengths), dtype, B=1, H=2)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(offsets)
    state = torch.randn(len(lengths), 2, 16, 24)
    output, last = triton(inputs, state=state, cu_seqlens=bounds)
    for n, length in enumerate(lengths):
        start, before = int(bounds[n]), state[n : n + 1]
        if length == 0:
            assert torch.equal(last[n : n + 1], before)
            continue
        alone = inputs.tokens(start, start + length)
        found = output[:, start : start + length], last[n : n + 1]
        assert_within_twice_plain(found, plain(alone, state=before), oracle(alone, state=before))


def test_offsets_past_the_tokens_read_and_write_none():
    # Values are not checked while a CUDA graph is captured, and may change before it is replayed.
    inputs = case("weak", 5, torch.float32, B=1, H=1)
    within = triton(inputs, cu_seqlens=torch.tensor([0, 3, 5]))
    past = triton(inputs, cu_seqlens=torch.tensor([-2, 3, 99]))
    assert all(map(torch.equal, within, past))


@DTYPE
def test_state_is_left_alone_unless_it_is_updated_in_place(dtype):
    inputs = case("weak", 2, dtype)
    state = make_state(inputs).to(DEVICE)
    kept = state.clone()
    output, last = triton(inputs, state=state)
    assert torch.equal(state, kept)
    assert torch.equal(triton_(inputs, state=state), output)
    assert torch.equal(state.cpu(), last)


@DTYPE
def test_steps_in_place_are_the_whole(dtype):
    inputs = case("mixed", 4, dtype, B=1)
    state = make_state(inputs)
    running = state.clone().to(DEVICE)
    outputs = [triton_(inputs.tokens(t, t + 1), state=running) for t in range(4)]
    found = torch.cat(outputs, dim=1), running.cpu()
    assert_within_twice_plain(found, plain(inputs, state=state), oracle(inputs, state=state))


@DTYPE
def test_two_runs_are_equal_and_every_element_is_written(monkeypatch, dtype):
    inputs = case("minus-20", 3, dtype)
    first = triton(inputs)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert all(map(torch.equal, first, triton(inputs)))


def test_writes_into_what_it_is_given_and_nowhere_else():
    inputs = case("weak", 2, torch.float32)
    expected = triton(inputs)
    # One element more at either end, so that a write outside would show.
    rooms = [torch.full((x.numel() + 2,), 7.0, device=DEVICE) for x in expected]
    output, last = (room[1:-1].view(x.shape) for room, x in zip(rooms, expected, strict=True))
    found = triton(inputs, output=output, final_state=last)
    assert all(map(torch.equal, found, expected))
    assert all((room[[0, -1]] == 7).all() for room in rooms)
    assert torch.equal(output.cpu(), expected[0])


def test_inputs_need_not_be_contiguous():
    inputs = case("weak", 3, torch.float32, B=2, H=2)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    state = make_state(inputs)
    assert not strided[0].is_contiguous()
    found = triton(strided, state=state.mT.contiguous().mT)
    assert all(map(torch.equal, found, triton(inputs, state=state)))


def test_a_nan_shows():
    for name in range(5):
        inputs = list(case("weak", 4, torch.float32, B=1, H=1))
        inputs[name][0, 2] = torch.nan
        output, state = triton(inputs)
        assert output[0, :2].isfinite().all()
        assert output[0, 2].isnan().any()
        assert name == 0 or state.isnan().any()


def test_no_sequences_and_no_tokens():
    inputs = case("weak", 2, torch.float32)
    state = make_state(inputs)
    output, last = triton(inputs.tokens(0, 0), state=state)
    assert output.shape == (2, 0, 3, 24)
    assert torch.equal(last, state)
    output, last = triton([x[:0] for x in inputs])
    assert (output.shape, last.shape) == ((0, 2, 3, 24), (0, 3, 16, 24))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        pytest.param("output", torch.empty(2, 2, 3, 25), id="shape-of-output"),
        pytest.param("output", torch.empty(2, 2, 3, 24).half(), id="dtype-of-output"),
        pytest.param("output", torch.empty(2, 2, 24, 3).mT, id="strides-of-output"),
        pytest.param("final_state", torch.empty(1, 3, 16, 24), id="shape-of-state"),
        pytest.param("final_state", torch.empty(2, 3, 16, 24).half(), id="dtype-of-state"),
        pytest.param("final_state", torch.empty(2, 3, 24, 16).mT, id="strides-of-state"),
        pytest.param(
            "final_state", torch.empty(2, 3, 16, 24, device="meta"), id="device-of-state"
        ),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(name, tensor):
    inputs = case("weak", 2, torch.float32)
    if tensor.device.type != "meta":
        tensor = tensor.to(DEVICE)
    inputs = [x.to(DEVICE) for x in inputs]
    with pytest.raises(KernelInputError, match=f"{name} cannot be written"):
        recurrent_kda_triton(
            *inputs, scale=1.0, state=None, qk_norm=False, law=PRECOMPUTED.value, **{name: tensor}
        )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("batch", [1, 9])
@DTYPE
def test_wide_heads_on_a_gpu(kind, batch, dtype):
    inputs = case(kind, 5, dtype, B=batch, H=32, K=128, V=128)
    check(inputs, state=make_state(inputs))


@pytest.mark.gpu
@DTYPE
def test_a_graph_replays_a_step_on_new_inputs(dtype):
    tokens = [case("weak", 1, dtype, B=4, H=32, K=128, V=128, seed=seed) for seed in range(4)]
    state = make_state(tokens[0]).to(DEVICE)
    inputs = [torch.empty_like(x, device=DEVICE) for x in tokens[0]]
    output = torch.empty_like(inputs[2])

    def step(state):
        return recurrent_kda_triton_(
            *inputs, scale=0.1, state=state, qk_norm=False, law=PRECOMPUTED.value, output=output
        )

    def feed(token):
        for held, x in zip(inputs, token, strict=True):
            held.copy_(x)

    feed(tokens[0])
    running = state.clone()
    step(running)  # compiles
    running.copy_(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(running)
    running.copy_(state)
    for token in tokens:
        feed(token)
        graph.replay()
        replayed = output.clone()
        assert torch.equal(replayed, step(state))
        assert torch.equal(running, state)


@pytest.mark.gpu
def test_states_of_more_than_two_billion_values():
    B, H, K, V = 1056, 128, 128, 128
    inputs = [x.to(DEVICE) for x in case("weak", 1, torch.bfloat16, B=1, H=H, K=K, V=V)]
    state = torch.zeros(B, H, K, V, device=DEVICE)
    assert state.numel() > 2**31
    state[-1].normal_()
    alone = state[-1:].clone()
    options = {"scale": 0.1, "qk_norm": False, "law": PRECOMPUTED.value}
    many = recurrent_kda_triton_(
        *(x.expand(B, *x.shape[1:]) for x in inputs), state=state, **options
    )
    expected, last = recurrent_kda_triton(*inputs, state=alone, **options)
    torch.testing.assert_close(many[-1:], expected)
    torch.testing.assert_close(state[-1:], last)
