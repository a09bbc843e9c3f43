"""The Triton form of `chunk_kda`: on a GPU where there is one, else in Triton's interpreter.

The bound is the error of the same algorithm in torch with its products in the same dtype: state,
deltas and decayed keys rounded to it, sums in fp32.
"""

from __future__ import annotations

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import Gate, chunk_kda, recurrent_kda
from tests.unit.kernels.devices import DEVICE, DTYPES
from tests.unit.kernels.kda.cases import GATES, LENGTHS, make_inputs, make_state, oracle

pytest.importorskip("triton")
# In the interpreter, numpy warns of what is meant to happen: the kernel for gentle gates overflows
# on steep ones, which a second kernel then does right; and minima over NaN are NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
SHORT = [length for length in LENGTHS if length <= 65]


def rounded_recurrence(inputs, dtype, *, state):
    """The recurrence in torch with the operands of its products rounded to a dtype."""
    T, K = inputs.q.shape[1], inputs.q.shape[-1]
    state = state.float()
    q, k, v, g, beta = (x.float() for x in inputs)

    def in_dtype(x):
        return x.to(dtype).float()

    outputs = []
    for t in range(T):
        state = state * g[:, t].exp().unsqueeze(-1)
        key, query = in_dtype(k[:, t]), in_dtype(q[:, t] * K**-0.5)
        read = torch.einsum("bhkv,bhk->bhv", in_dtype(state), key)
        delta = in_dtype(beta[:, t, :, None] * (v[:, t] - read))
        state = state + key.unsqueeze(-1) * delta.unsqueeze(-2)
        outputs.append(torch.einsum("bhkv,bhk->bhv", in_dtype(state), query))
    return torch.stack(outputs, 1).to(dtype), state


def check(found, inputs, dtype, *, state=None):
    """Bound the largest and the root mean square error by twice those of the recurrence above.

    The floor of two roundings counts where the recurrence is right by luck, as for one token.
    """
    inputs = type(inputs)(*(x.to(DEVICE) for x in inputs))
    (B, _, H, K), V = inputs.q.shape, inputs.v.shape[-1]
    state = torch.zeros(B, H, K, V) if state is None else state
    state = state.to(DEVICE)
    expected = oracle(inputs, state=state)
    plain = rounded_recurrence(inputs, dtype, state=state)
    floor = 2 * torch.finfo(dtype).eps
    for found_x, plain_x, expected_x in zip(found, plain, expected, strict=True):
        assert found_x.dtype == plain_x.dtype
        assert torch.isfinite(found_x).all()
        for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            allowed = 2 * size(plain_x - expected_x) + floor * size(expected_x)
            assert size(found_x - expected_x) <= allowed


def case(kind, T, dtype, **shape):
    """Inputs in a dtype, the gate in fp32."""
    inputs = make_inputs(kind, T, **shape)
    g = inputs.g
    return inputs.to(dtype)._replace(g=g)


def triton(inputs, **options):
    moved = {
        name: value.to(DEVICE) if torch.is_tensor(value) else value
        for name, value in options.items()
    }
    return chunk_kda(*(x.to(DEVICE) for x in inputs), **moved, backend="triton")


@DTYPE
@pytest.mark.parametrize(
    ("kind", "T"), [*(("mixed", T) for T in SHORT), *((kind, 65) for kind in GATES)]
)
def test_error_is_within_twice_that_of_torch(kind, T, dtype):
    inputs = case(kind, T, dtype, B=1, H=1)
    check(triton(inputs), inputs, dtype)


@DTYPE
@pytest.mark.parametrize("shape", [(16, 16), (24, 40), (72, 72), (128, 64)], ids=str)
def test_any_width_of_keys_and_values(shape, dtype):
    K, V = shape
    inputs = case("mixed", 70, dtype, B=1, H=1, K=K, V=V)
    check(triton(inputs), inputs, dtype)


@DTYPE
def test_starts_from_a_state_and_leaves_it_alone(dtype):
    inputs = case("weak", 66, dtype, B=3, H=1)
    state = make_state(inputs)
    kept = state.clone()
    check(triton(inputs, initial_state=state), inputs, dtype, state=state)
    assert torch.equal(state, kept)


@DTYPE
def test_keys_that_are_alike_lose_no_more_than_in_torch(dtype):
    inputs = case("weak", 128, dtype, B=1, H=1, similar=3.0)
    check(triton(inputs), inputs, dtype)


@DTYPE
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "bounded"])
def test_fused_options_equal_the_same_steps_in_torch(dtype, lower_bound):
    B, T, H, HV, K, V = 1, 70, 2, 4, 16, 24
    q, k = (10 ** torch.randn(2, B, T, H, 1)) * torch.randn(2, B, T, H, K)  # tiny and huge
    v, f = torch.randn(B, T, HV, V), torch.randn(B, T, HV, K)
    q, k, v, f, beta = (x.to(dtype) for x in (q, k, v, f, torch.randn(B, T, HV)))
    gate = Gate(A_log=torch.rand(HV), dt_bias=torch.randn(HV, K) - 2, lower_bound=lower_bound)
    options = {"qk_norm": True, "beta_logits": True}
    expected = chunk_kda(
        *(x.double() for x in (q, k, v, f, beta)),
        gate=Gate(
            A_log=gate.A_log.double(), dt_bias=gate.dt_bias.double(), lower_bound=lower_bound
        ),
        **options,
    )
    moved = Gate(
        A_log=gate.A_log.to(DEVICE), dt_bias=gate.dt_bias.to(DEVICE), lower_bound=lower_bound
    )
    found = triton((q, k, v, f, beta), gate=moved, **options)
    bound = 8 * torch.finfo(dtype).eps  # a few roundings of the operands along the way
    for found_x, expected_x in zip(found, expected, strict=True):
        error = (found_x.cpu().double() - expected_x).square().mean().sqrt()
        assert error <= bound * expected_x.square().mean().sqrt()


@DTYPE
def test_dtypes_may_be_mixed(dtype):
    inputs = case("weak", 20, dtype, B=1, H=1)
    mixed = inputs._replace(q=inputs.q.float(), beta=inputs.beta.float())
    assert all(map(torch.equal, triton(mixed), triton(inputs)))


@DTYPE
def test_packed_sequences_equal_one_after_another(dtype):
    lengths = [0, 1, 64, 0, 65, 17, 0]
    inputs = case("mixed", sum(lengths), dtype, B=1, H=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    state = torch.randn(len(lengths), 1, 16, 24)
    output, states = triton(inputs, cu_seqlens=bounds, initial_state=state)
    for n, length in enumerate(lengths):
        start = int(bounds[n])
        if length == 0:
            assert torch.equal(states[n].cpu(), state[n])
            continue
        alone = triton(inputs.tokens(start, start + length), initial_state=state[n : n + 1])
        assert torch.equal(output[:, start : start + length], alone[0])
        assert torch.equal(states[n : n + 1], alone[1])


@DTYPE
def test_more_tokens_do_not_change_what_came_before(dtype):
    # Factors of a chunk are relative to a row that depends on all of it: they round anew.
    inputs = case("mixed", 100, dtype, B=1, H=1)
    longer, _ = triton(inputs)
    shorter, _ = triton(inputs.tokens(0, 75))
    bound = 4 * torch.finfo(dtype).eps * longer.abs().max()
    assert (longer[:, :75] - shorter).abs().max() <= bound


@DTYPE
def test_two_runs_are_equal_and_every_element_is_written(monkeypatch, dtype):
    inputs = case("minus-20", 70, dtype, B=2, H=1)
    first = triton(inputs)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(1)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device)
    )
    second = triton(inputs)
    assert all(map(torch.equal, first, second))


def test_the_recurrent_form_runs_on_triton_too():
    inputs = [x.to(DEVICE) for x in case("mixed", 5, torch.float32, B=2, H=2)]
    state = make_state(make_inputs("mixed", 5, H=2)).to(DEVICE)
    options = {"qk_norm": True, "beta_logits": True, "initial_state": state}
    found = recurrent_kda(*inputs, **options, backend="triton")
    for found_x, expected_x in zip(found, recurrent_kda(*inputs, **options), strict=True):
        assert (found_x - expected_x).abs().max() <= 1e-5 * expected_x.abs().max()
    with pytest.raises(KernelInputError, match="no gradients"):
        recurrent_kda(*(x.requires_grad_() for x in inputs), backend="triton")


def test_inputs_need_not_be_contiguous():
    inputs = case("weak", 20, torch.float32, B=2, H=2)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not strided[0].is_contiguous()
    assert all(map(torch.equal, triton(strided), triton(inputs)))


def test_a_nan_shows():
    for name in range(5):
        inputs = list(case("weak", 10, torch.float32, B=1, H=1))
        inputs[name][0, 3] = torch.nan
        output, state = triton(inputs)
        assert output[0, 3].isnan().any()
        assert name == 0 or state.isnan().any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param({"chunk_size": 64}, "chunk size", id="chunk-size"),
        pytest.param({"backend": "metal"}, "no such backend", id="backend"),
        pytest.param({"backend": "cuda"}, "CUDA stages do not serve", id="cuda"),
    ],
)
def test_what_triton_does_not_serve_is_refused(options, word):
    inputs = [x.to(DEVICE) for x in make_inputs("weak", 5)]
    with pytest.raises(KernelInputError, match=word):
        chunk_kda(*inputs, **{"backend": "triton", **options})


def test_wide_keys_and_doubles_are_refused_or_left_to_torch():
    wide = [x.to(DEVICE) for x in make_inputs("weak", 5, K=257)]
    double = [x.to(DEVICE).double() for x in make_inputs("weak", 5)]
    for inputs, word in ((wide, "wider"), (double, "fp64")):
        with pytest.raises(KernelInputError, match=word):
            chunk_kda(*inputs, backend="triton")
        output, _ = chunk_kda(*inputs)
        assert torch.isfinite(output).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
@DTYPE
def test_wide_heads_on_a_gpu(kind, T, dtype):
    inputs = case(kind, T, dtype, B=1, H=2, K=128, V=128)
    check(triton(inputs), inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 256), (200, 136), (256, 16), (256, 256)], ids=str)
@DTYPE
def test_widest_heads_on_a_gpu(shape, dtype):
    K, V = shape
    inputs = case("mixed", 200, dtype, B=2, H=2, K=K, V=V)
    check(triton(inputs), inputs, dtype)
