"""The layer of flash-linear-attention in our model: its names, its cache, and what keeps it from running."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kimi_convert.config.huggingface import read_config
from kimi_convert.kernels.kda import Gate, recurrent_kda
from kimi_convert.kernels.norm import gated_rms_norm
from kimi_convert.model.kda import KimiDeltaAttention
from kimi_convert.model.numerics import SERVED
from kimi_convert.validation.parity import process_runners
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.oracles import fla_layer, fla_mixer
from kimi_convert.validation.parity.oracles.fla_mixer import NAMES, WITHOUT_OURS, weights_for
from kimi_convert.validation.parity.process_runners import FlaRunner
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    one_piece,
    single_tokens,
    trace_checkpoint,
    uneven_pieces,
)
from tests.tiny import tiny_config, write_tiny_checkpoint

CONFIG = tiny_config("kimi_linear")
TOKENS = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(7))


class StandIn(nn.Module):
    """Parameters, call and cache of the library's layer, on our recurrence."""

    def __init__(self, ours: KimiDeltaAttention) -> None:
        super().__init__()
        self.ours = [ours]  # sizes alone; not a module of this one
        width, inner, head = ours.q.in_features, ours.q.out_features, len(ours.o_norm.weight)
        taps = ours.q_conv.weight.shape[-1]
        for name in "qkv":
            self.add_module(f"{name}_proj", nn.Linear(width, inner, bias=False))
            self.add_module(
                f"{name}_conv1d", nn.Conv1d(inner, inner, taps, groups=inner, bias=False)
            )
        self.A_log = nn.Parameter(torch.zeros(ours.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.b_proj = nn.Linear(width, ours.num_heads, bias=False)
        self.f_proj, self.g_proj = (
            nn.Sequential(
                nn.Linear(width, head, bias=False), nn.Linear(head, inner, bias=with_bias)
            )
            for with_bias in (False, True)
        )
        self.o_norm = GatedNorm(head, ours.o_norm.eps)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states, past_key_values, use_cache):
        heads = (len(self.A_log), -1)
        last = past_key_values[0] if len(past_key_values) > 0 else None
        convolved: list[Any] = []
        conv_states = []
        for number, name in enumerate("qkv"):
            conv = self.get_submodule(f"{name}_conv1d")
            x = self.get_submodule(f"{name}_proj")(hidden_states).mT  # [B, P, T]
            past = x.new_zeros(*x.shape[:2], 3) if last is None else last["conv_state"][number]
            window = torch.cat((past, x), -1)
            convolved.append(nn.functional.silu(conv(window)).mT.unflatten(-1, heads))
            conv_states.append(window[..., -3:])
        q, k, v = convolved
        mixed, state = recurrent_kda(
            *(q, k, v),
            self.f_proj(hidden_states).unflatten(-1, heads),
            self.b_proj(hidden_states),
            gate=Gate(A_log=self.A_log, dt_bias=self.dt_bias.unflatten(0, heads)),
            qk_norm=True,
            beta_logits=True,
            initial_state=None if last is None else last["recurrent_state"].mT,
        )
        past_key_values.update(
            layer_idx=0,
            recurrent_state=state.mT,
            conv_state=tuple(conv_states),
            offset=hidden_states.shape[1],
        )
        gate = self.g_proj(hidden_states).unflatten(-1, heads)
        return self.o_proj(self.o_norm(mixed, gate).flatten(2)), None, past_key_values


class GatedNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, gate):
        return gated_rms_norm(x, gate, self.weight, eps=self.eps)


def exchange(layer):
    fla_mixer.exchange_mixer(layer, StandIn)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("fla") / "c", CONFIG, seed=5)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return trace_checkpoint(checkpoint, TOKENS, TorchRun())


def compared(checkpoint, reference, pieces=one_piece):
    found = trace_checkpoint(checkpoint, TOKENS, TorchRun(pieces=pieces, exchange=exchange))
    assert found.values.keys() == reference.values.keys()
    return compare_traces(found, reference, dtype=torch.float32, config=read_config(checkpoint))


def our_mixer():
    return KimiDeltaAttention(CONFIG, SERVED, dtype=torch.float32)


def test_every_weight_of_ours_has_one_name_there():
    assert NAMES.keys() == dict(our_mixer().named_parameters()).keys()
    assert len(set(NAMES.values()) | {WITHOUT_OURS}) == len(NAMES) + 1


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_the_librarys_layer_has_these_names_and_shapes():
    pytest.importorskip("fla.layers.kda", reason="flash-linear-attention is not installed")
    ours = our_mixer()
    layer = fla_layer.new_layer(ours)
    shapes = {name: values.shape for name, values in layer.state_dict().items()}
    assert shapes == {name: values.shape for name, values in weights_for(ours).items()}
    norm: Any = layer.o_norm
    assert (norm.eps, norm.activation) == (ours.o_norm.eps, "sigmoid")


@pytest.mark.parametrize("pieces", [one_piece, uneven_pieces, single_tokens])
def test_a_model_with_its_layers_is_the_same_model_at_every_stage(checkpoint, reference, pieces):
    result = compared(checkpoint, reference, pieces)
    assert result.passed, (result.failures, result.location)


def test_greedy_continuation_with_its_layers_is_the_same(checkpoint):
    prompt = TOKENS[0, :8].tolist()
    runs = (TorchRun(exchange=exchange), TorchRun())
    found, expected = (continue_greedily(checkpoint, prompt, 12, run) for run in runs)
    assert compare_greedy(found, expected, bound=1e-5).passed


def test_weights_under_each_others_names_are_found(checkpoint, reference, monkeypatch):
    wrong = {**NAMES, "f_a.weight": NAMES["g_a.weight"], "g_a.weight": NAMES["f_a.weight"]}
    monkeypatch.setattr(fla_mixer, "NAMES", wrong)
    location = compared(checkpoint, reference).location
    assert location is not None
    assert location.name == "layers.0.kda.f"


def test_what_keeps_it_from_running_is_said(checkpoint, monkeypatch, tmp_path):
    problem: Any = SimpleNamespace(config=CONFIG)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in FlaRunner().why_not(problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found: dict[str, Any] = {"fla": None}
    monkeypatch.setattr(process_runners, "find_spec", found.get)
    assert "pip install flash-linear-attention" in FlaRunner().why_not(problem)
    # fla-core alone: the package is there, the layers are not.
    found["fla"] = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    assert "fla.layers not installed" in FlaRunner().why_not(problem)
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "kda.py").touch()
    assert FlaRunner().why_not(problem) == ""
    teacher: Any = SimpleNamespace(config=tiny_config("deepseek_v3"))
    assert "no KDA layers" in FlaRunner().why_not(teacher)
