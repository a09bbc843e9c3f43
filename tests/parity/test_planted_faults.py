"""Each fault is found, with the layer and the sub-module that it was planted in."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.model.numerics import TRANSFORMERS
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.run import ParityOptions, compare_implementations
from kimi_convert.validation.parity.torch_model import TorchRun, trace_checkpoint
from kimi_convert.validation.parity.trace import Trace
from tests.integration.command_line import run_here
from tests.parity import faults

SMALL = ("--tokens", 40, "--new-tokens", 8)
IN_FILES = [
    pytest.param(faults.permute_heads_of_k, 1, "kda.k", id="head-permuted"),
    pytest.param(faults.round_a_log, 2, "kda.decay", id="A_log-rounded-to-bf16"),
    pytest.param(faults.swap_experts_of_two_layers, 1, "moe.experts", id="tensor-of-other-layer"),
    pytest.param(faults.move_eps, 0, "input_norm", id="eps-moved"),
    pytest.param(faults.narrow_bias_of_router, 2, "moe.scores", id="router-bias-in-bf16"),
]
IN_WHAT_RUNS = [
    pytest.param(faults.bound_the_gate, 1, "kda.decay", "float64", id="gate-law-swapped"),
    pytest.param(faults.bias_the_routing, 2, "moe.router", "float64", id="biased-weights"),
    pytest.param(faults.move_eps_of_latent, 3, "mla.kv_a_norm", "float64", id="latent-eps-moved"),
    pytest.param(
        faults.keep_state_transposed, 2, "kda.state", "float64", id="K-and-V-of-state-exchanged"
    ),
]


@pytest.mark.parametrize(("fault", "layer_idx", "stage"), IN_FILES)
def test_fault_in_an_artifact_is_found_by_the_command(
    fault, layer_idx, stage, tiny_hybrid, tmp_path
):
    artifact = faults.artifact_with(fault, tiny_hybrid, tmp_path / "wrong")
    done = run_here("parity", tiny_hybrid, artifact, "--against", "torch", *SMALL, "--json")
    assert done.returncode == 6
    (found,) = json.loads(done.stdout)["implementations"]
    location = found["comparison"]["location"]
    assert (location["layer_idx"], location["stage"]) == (layer_idx, stage)


@pytest.mark.parametrize(("fault", "layer_idx", "stage", "runner"), IN_WHAT_RUNS)
def test_fault_in_an_implementation_is_found(
    fault, layer_idx, stage, runner, tiny_hybrid, monkeypatch
):
    faults.plant(monkeypatch, layer_idx, fault, dtype=torch.float64)
    location = location_of(tiny_hybrid, runner)
    assert (location.layer_idx, location.stage) == (layer_idx, stage)


def test_state_that_is_handed_over_transposed_is_found_at_the_first_cut(tiny_hybrid, monkeypatch):
    faults.plant(monkeypatch, 1, faults.exchange_k_and_v, dtype=torch.float32)
    location = location_of(tiny_hybrid, "pieces")
    assert (location.layer_idx, location.stage) == (1, "kda.recurrence")
    assert location.first_token == 1  # pieces are cut after the first token


def test_exchanged_state_and_permuted_heads_are_called_by_their_names(
    tiny_hybrid, tmp_path, monkeypatch
):
    artifact = faults.artifact_with(faults.permute_heads_of_k, tiny_hybrid, tmp_path / "wrong")
    done = run_here("parity", tiny_hybrid, artifact, "--against", "torch", *SMALL)
    assert "the first difference is at layers.1.kda.k (k projection)" in done.stdout
    assert "channel 16 stands where 0 belongs, 32 of 64 moved" in done.stdout
    faults.plant(monkeypatch, 2, faults.keep_state_transposed, dtype=torch.float64)
    assert "K and V, are exchanged" in location_of(tiny_hybrid, "float64").note


def test_gate_law_swapped_in_transformers_is_found(tiny_hybrid):
    pytest.importorskip("transformers")
    from kimi_convert.validation.parity.oracles import transformers_native

    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = trace_checkpoint(tiny_hybrid, tokens, TorchRun(numerics=TRANSFORMERS))
    model = transformers_native.load(str(tiny_hybrid))

    def compared():
        found = Trace(transformers_native.trace_model(model, tokens))
        return compare_traces(
            found, expected, dtype=torch.float32, config=read_config(tiny_hybrid)
        )

    assert compared().passed
    faults.bound_their_gate(model.model.layers[2].self_attn.forget_gate)
    location = compared().location
    assert (location.layer_idx, location.stage) == (2, "kda.decay")


def test_nothing_is_found_where_nothing_is_planted(tiny_hybrid, tmp_path):
    artifact = faults.artifact_with(lambda folder: None, tiny_hybrid, tmp_path / "same")
    done = run_here("parity", tiny_hybrid, artifact, "--against", "torch", *SMALL)
    assert done.returncode == 0, done.stdout
    assert "first difference" not in done.stdout


def location_of(folder, runner):
    options = ParityOptions(against=(runner,), tokens=40, new_tokens=0)
    report = compare_implementations(folder, options=options)
    assert not report.passed
    (found,) = report.implementations
    assert found.comparison.location is not None
    return found.comparison.location
