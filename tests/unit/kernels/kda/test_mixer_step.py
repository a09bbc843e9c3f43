"""The fused step is the chain of the plain functions, one token at a time, in torch and on Triton."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import Gate
from kimi_convert.kernels.kda.mixer_step import kda_mixer_step_
from kimi_convert.kernels.kda.reference import recurrent_kda_reference
from kimi_convert.kernels.norm import gated_rms_norm, l2_norm
from kimi_convert.kernels.short_conv import short_conv
from tests.unit.kernels.devices import DEVICE, DTYPES
from tests.unit.kernels.kda.cases import assert_within_twice_plain

pytest.importorskip("triton")

IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
EPS = 1e-5


class Mixer(NamedTuple):
    """T tokens and the parameters and states of a mixer."""

    tokens: dict[str, Tensor]  # each [T, B, P]
    conv_weights: tuple[Tensor, ...]
    conv_states: tuple[Tensor, ...]
    state: Tensor
    gate: Gate
    norm_weight: Tensor

    def to(self, dtype, *, precise=torch.float32, device="cpu") -> Mixer:
        """A copy; `precise` is the dtype of the state and of the gate's parameters."""

        def cast(x):
            return x.to(device=device, dtype=dtype, copy=True)

        return Mixer(
            {name: cast(x) for name, x in self.tokens.items()},
            tuple(map(cast, self.conv_weights)),
            tuple(map(cast, self.conv_states)),
            self.state.to(device=device, dtype=precise, copy=True),
            Gate(
                A_log=self.gate.A_log.to(device=device, dtype=precise),
                dt_bias=self.gate.dt_bias.to(device=device, dtype=precise),
                lower_bound=self.gate.lower_bound,
            ),
            cast(self.norm_weight),
        )

    def token(self, t):
        return {name: x[t] for name, x in self.tokens.items()}

    def options(self):
        return {
            "conv_weights": self.conv_weights,
            "conv_states": self.conv_states,
            "state": self.state,
            "gate": self.gate,
            "norm_weight": self.norm_weight,
            "norm_eps": EPS,
        }

    def steps(self, **options):
        """Outputs [T, B, P] of all tokens; the states move on."""
        T = len(self.tokens["q"])
        outputs = [kda_mixer_step_(**self.token(t), **self.options(), **options) for t in range(T)]
        return torch.stack(outputs)


def make_mixer(dtype, *, T=4, B=2, H=2, K=16, V=24, W=4, lower_bound=None, size=1.0, seed=0):
    """Values that dtype holds exactly, in fp32."""
    torch.manual_seed(seed)
    widths = {"q": H * K, "k": H * K, "v": H * V, "f": H * K, "b": H, "output_gate": H * V}
    channels = [H * K, H * K, H * V]
    mixer = Mixer(
        {name: size * torch.randn(T, B, width) for name, width in widths.items()},
        tuple(torch.randn(P, 1, W) for P in channels),
        tuple(size * torch.randn(B, P, W - 1) for P in channels),
        torch.randn(B, H, K, V),
        Gate(A_log=torch.rand(H), dt_bias=torch.randn(H, K) - 2, lower_bound=lower_bound),
        1 + 0.1 * torch.randn(V),
    )
    return mixer.to(dtype).to(torch.float32)


def double(mixer):
    return mixer.to(torch.float64, precise=torch.float64)


def check(mixer, dtype):
    """Bound the error of Triton by that of torch in the same dtype; inputs must be kept exactly."""
    found = mixer.to(dtype, device=DEVICE)
    plain, oracle = mixer.to(dtype), double(mixer)
    output = found.steps(backend="triton").cpu()
    plain_output, oracle_output = plain.steps(backend="torch"), oracle.steps()
    assert_within_twice_plain(
        (output, found.state.cpu()), (plain_output, plain.state), (oracle_output, oracle.state)
    )
    for found_past, plain_past in zip(found.conv_states, plain.conv_states, strict=True):
        assert torch.equal(found_past.cpu(), plain_past)


@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "bounded"])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_steps_in_torch_are_the_chain_of_plain_functions_over_all_tokens(W, lower_bound):
    mixer = double(make_mixer(torch.float64, W=W, lower_bound=lower_bound))
    tokens = {name: x.transpose(0, 1) for name, x in mixer.tokens.items()}  # [B, T, P]
    heads, pasts = [], []
    for name, weight, past in zip("qkv", mixer.conv_weights, mixer.conv_states, strict=True):
        y, last = short_conv(tokens[name], weight, state=past)
        heads.append(y.unflatten(-1, (2, -1)))
        pasts.append(last)
    mixed, state = recurrent_kda_reference(
        l2_norm(heads[0]),
        l2_norm(heads[1]),
        heads[2],
        mixer.gate.log_decay(tokens["f"].unflatten(-1, (2, -1))),
        tokens["b"].sigmoid(),
        scale=16**-0.5,
        state=mixer.state,
    )
    output_gate = tokens["output_gate"].unflatten(-1, (2, -1))
    expected = gated_rms_norm(mixed, output_gate, mixer.norm_weight, eps=EPS).flatten(2)
    held = mixer.conv_states, mixer.state
    found = mixer.steps(backend="torch")
    torch.testing.assert_close(found.transpose(0, 1), expected)
    torch.testing.assert_close(held, (tuple(pasts), state))


@DTYPE
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "bounded"])
def test_error_is_within_twice_that_of_torch(lower_bound, B, dtype):
    check(make_mixer(dtype, B=B, T=7, lower_bound=lower_bound), dtype)


@DTYPE
@pytest.mark.parametrize(
    "shape", [(16, 16), (17, 19), (24, 40), (64, 200), (72, 72), (128, 128), (256, 20)], ids=str
)
def test_any_width_of_keys_and_values(shape, dtype):
    K, V = shape
    check(make_mixer(dtype, B=1, K=K, V=V), dtype)


@DTYPE
@pytest.mark.parametrize("W", [1, 2, 3, 5])
def test_any_width_of_the_convolution(W, dtype):
    check(make_mixer(dtype, T=6, B=1, W=W), dtype)


# The interpreter's numpy says what a GPU does not: exp of a large logit overflows, as it may.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@DTYPE
@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0])
def test_tiny_and_huge_inputs(size, dtype):
    check(make_mixer(dtype, size=size), dtype)


@DTYPE
def test_two_runs_are_equal_and_every_element_is_written(monkeypatch, dtype):
    mixer = make_mixer(dtype)
    first, second = mixer.to(dtype, device=DEVICE), mixer.to(dtype, device=DEVICE)
    expected = first.steps(backend="triton")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert torch.equal(second.steps(backend="triton"), expected)
    assert torch.equal(second.state, first.state)
    assert all(map(torch.equal, second.conv_states, first.conv_states))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_states_and_output_are_written(backend):
    mixer = make_mixer(torch.float32, T=1).to(torch.float32, device=DEVICE)
    before = mixer.to(torch.float32, device=DEVICE)
    output = torch.full_like(mixer.token(0)["v"], torch.nan)
    held = (mixer.state.data_ptr(), *(x.data_ptr() for x in mixer.conv_states))
    found = kda_mixer_step_(**mixer.token(0), **mixer.options(), output=output, backend=backend)
    assert found is output
    assert found.isfinite().all()
    assert held == (mixer.state.data_ptr(), *(x.data_ptr() for x in mixer.conv_states))
    for name in mixer.tokens:
        assert torch.equal(mixer.tokens[name], before.tokens[name])
    assert all(map(torch.equal, mixer.conv_weights, before.conv_weights))
    assert torch.equal(mixer.norm_weight, before.norm_weight)
    assert not torch.equal(mixer.state, before.state)


def test_rows_may_lie_apart_as_slices_of_one_projection():
    mixer = make_mixer(torch.float32, T=1).to(torch.float32, device=DEVICE)
    copy = mixer.to(torch.float32, device=DEVICE)
    token = mixer.token(0)
    merged = torch.cat(tuple(token.values()), dim=-1)
    sizes = [x.shape[-1] for x in token.values()]
    slices = dict(zip(token, merged.split(sizes, dim=-1), strict=True))
    assert not slices["q"].is_contiguous()
    apart = kda_mixer_step_(**slices, **mixer.options(), backend="triton")
    columns = {name: x.mT.contiguous().mT for name, x in copy.token(0).items()}
    assert torch.equal(apart, kda_mixer_step_(**columns, **copy.options(), backend="triton"))


def test_no_sequences():
    mixer = make_mixer(torch.float32, B=0, T=1).to(torch.float32, device=DEVICE)
    assert kda_mixer_step_(**mixer.token(0), **mixer.options()).shape == (0, 48)


def test_no_gradient_flows():
    mixer = make_mixer(torch.float32, T=1)
    mixer.conv_weights[0].requires_grad_()
    assert not kda_mixer_step_(**mixer.token(0), **mixer.options(), backend="torch").requires_grad
    assert not mixer.state.requires_grad


@pytest.mark.parametrize("name", ["q", "k", "v", "f", "b", "output_gate", "output"])
@pytest.mark.parametrize("problem", ["shape", "dtype", "device", "kind"])
def test_a_wrong_input_is_named(name, problem):
    mixer = make_mixer(torch.float32, T=1)
    arguments = {**mixer.token(0), **mixer.options(), "output": torch.empty(2, 48)}
    tensor = arguments[name]
    arguments[name] = {
        "shape": tensor[:, :-1],
        "dtype": tensor.long(),
        "device": tensor.to("meta"),
        "kind": [1.0],
    }[problem]
    with pytest.raises(KernelInputError, match=rf"\b{name}\b"):
        kda_mixer_step_(**arguments, backend="torch")


def replaced(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("state", lambda x: x[0], id="rank-of-state"),
        pytest.param("state", lambda x: x.half(), id="dtype-of-state"),
        pytest.param("state", lambda x: x.mT.contiguous().mT, id="strides-of-state"),
        pytest.param("conv_weights", lambda x: x[:2], id="number-of-weights"),
        pytest.param("conv_weights", lambda x: replaced(x, 0, x[0][0]), id="rank-of-weight"),
        pytest.param("conv_weights", lambda x: replaced(x, 0, x[0][..., :0]), id="no-taps"),
        pytest.param("conv_weights", lambda x: replaced(x, 1, x[1][..., :3]), id="taps-of-k"),
        pytest.param("conv_weights", lambda x: replaced(x, 2, x[1]), id="channels-of-v"),
        pytest.param("conv_states", lambda x: x[:2], id="number-of-states"),
        pytest.param("conv_states", lambda x: replaced(x, 1, x[2]), id="channels-of-k"),
        pytest.param("conv_states", lambda x: replaced(x, 2, x[2].half()), id="dtype-of-past"),
        pytest.param(
            "conv_states", lambda x: replaced(x, 0, x[0].mT.contiguous().mT), id="strides-of-past"
        ),
        pytest.param("norm_weight", lambda x: x[:-1], id="norm-weight"),
    ],
)
def test_a_wrong_state_or_weight_is_named(name, change):
    mixer = make_mixer(torch.float32, T=1)
    arguments = {**mixer.token(0), **mixer.options()}
    arguments[name] = change(arguments[name])
    with pytest.raises(KernelInputError, match=name):
        kda_mixer_step_(**arguments, backend="torch")


@pytest.mark.parametrize("name", ["A_log", "dt_bias"])
def test_wrong_parameters_of_the_gate_are_named(name):
    mixer = make_mixer(torch.float32, T=1)
    parameters = {"A_log": mixer.gate.A_log, "dt_bias": mixer.gate.dt_bias}
    parameters[name] = parameters[name][:1]
    options = {**mixer.options(), "gate": Gate(**parameters)}
    with pytest.raises(KernelInputError, match=name):
        kda_mixer_step_(**mixer.token(0), **options, backend="torch")


def test_wide_heads_are_refused_or_left_to_torch():
    mixer = make_mixer(torch.float32, T=1, K=257).to(torch.float32, device=DEVICE)
    with pytest.raises(KernelInputError, match="state"):
        kda_mixer_step_(**mixer.token(0), **mixer.options(), backend="triton")
    assert kda_mixer_step_(**mixer.token(0), **mixer.options()).isfinite().all()


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("shape", [(128, 128), (256, 256), (64, 64)], ids=str)
@pytest.mark.parametrize("B", [1, 9])
def test_wide_heads_on_a_gpu(B, shape, dtype):
    K, V = shape
    check(make_mixer(dtype, T=9, B=B, H=32, K=K, V=V), dtype)


@pytest.mark.gpu
@DTYPE
def test_a_graph_replays_a_step_on_new_inputs(dtype):
    mixer = make_mixer(dtype, T=6, H=32, K=128, V=128)
    eager, replayed = mixer.to(dtype, device=DEVICE), mixer.to(dtype, device=DEVICE)
    start = mixer.to(dtype, device=DEVICE)
    inputs = {name: x.clone() for name, x in replayed.token(0).items()}
    output = torch.empty_like(inputs["v"])
    options = {**replayed.options(), "output": output}
    kda_mixer_step_(**inputs, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kda_mixer_step_(**inputs, **options)
    for held, x in zip(
        (replayed.state, *replayed.conv_states), (start.state, *start.conv_states), strict=True
    ):
        held.copy_(x)
    for t in range(6):
        for name, x in replayed.token(t).items():
            inputs[name].copy_(x)
        graph.replay()
        assert torch.equal(output, kda_mixer_step_(**eager.token(t), **eager.options()))
    assert torch.equal(replayed.state, eager.state)
    assert all(map(torch.equal, replayed.conv_states, eager.conv_states))
