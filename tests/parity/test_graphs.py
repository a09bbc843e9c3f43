"""Exported graphs in everything that runs them: stages, states, continuations, and a planted fault."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    MoeForm,
    OnnxOptions,
    Precision,
    Quantization,
    Target,
)
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.oracles import onnx_genai, onnx_reference, onnx_runtime
from kimi_convert.validation.parity.oracles.process import (
    OracleDeclinedError,
    OracleRequest,
    ask_oracle,
)
from kimi_convert.validation.parity.runners import graph_runners, is_graph
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    trace_checkpoint,
)
from tests.parity import faults
from tests.tiny import tiny_config, write_tiny_checkpoint

TOKENS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(2))
PROMPT = TOKENS[0, :6].tolist()
TARGETS = {
    "ort": OnnxOptions(),
    "ort-active": OnnxOptions(moe=MoeForm.ACTIVE),
    "onnx27": OnnxOptions(target=Target.ONNX27),
    "custom": OnnxOptions(target=Target.CUSTOM),
}
RUNS = {
    "runtime": onnx_runtime.trace_with_onnx_runtime,
    "evaluator": onnx_reference.trace_with_evaluator,
    "genai": onnx_genai.trace_with_genai,
}
INSIDE = {"input_norm", "kda.q", "kda.decay", "kda.recurrence", "kda.o", "mla.kv_a", "hidden"}


@pytest.fixture(scope="module")
def reference(tiny_hybrid):
    return trace_checkpoint(tiny_hybrid, TOKENS, TorchRun())


@pytest.fixture(scope="module")
def graphs(tiny_hybrid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    for name, options in TARGETS.items():
        export_onnx(tiny_hybrid, folder / name, options=options)
    return folder


def request(checkpoint, artifact):
    return OracleRequest(
        folder=str(checkpoint),
        artifact=str(artifact),
        tokens=TOKENS.tolist(),
        forms=["prefill", "decode"],
        prompt=PROMPT,
        new_tokens=16,
    )


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("target", TARGETS)
def test_graph_agrees_with_our_model(tiny_hybrid, graphs, reference, target, run):
    asked = request(tiny_hybrid, graphs / target)
    if target == "ort" and run is RUNS["evaluator"]:
        with pytest.raises(SystemExit):
            run(asked)
        return
    expected = continue_greedily(tiny_hybrid, PROMPT, 16, TorchRun())
    for form, trace in run(asked).items():
        result = compare_traces(
            trace, reference, dtype=torch.float32, config=read_config(tiny_hybrid)
        )
        assert result.passed, (form, result.failures, result.location)
        if trace.greedy is not None:
            assert compare_greedy(trace.greedy, expected, bound=result.bound).passed
        if form == "prefill":
            assert {probe.stage for probe in trace.values} >= INSIDE


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (OnnxOptions(precision=Precision.FP16), torch.float16),
        (OnnxOptions(precision=Precision.BF16), torch.bfloat16),
    ],
    ids=["fp16", "bf16"],
)
def test_graph_of_narrower_weights_is_judged_by_their_bound(
    tiny_hybrid, reference, tmp_path, options, dtype
):
    export_onnx(tiny_hybrid, tmp_path / "graph", options=options)
    asked = request(tiny_hybrid, tmp_path / "graph")
    for trace in RUNS["runtime"](asked).values():
        assert trace.dtype is dtype
        config = read_config(tiny_hybrid)
        result = compare_traces(trace, reference, dtype=dtype, config=config)
        assert result.passed, (result.failures, result.location)
        assert not compare_traces(trace, reference, dtype=torch.float32, config=config).passed


def test_graph_of_integers_is_declined(tiny_hybrid, tmp_path, capsys):
    config = tiny_config("kimi_linear", moe_intermediate_size=32)
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", config)
    export_onnx(folder, tmp_path / "graph", options=OnnxOptions(quantize=Quantization.INT8))
    with pytest.raises(SystemExit):
        RUNS["runtime"](request(tiny_hybrid, tmp_path / "graph"))
    assert "integers" in capsys.readouterr().err


def test_every_state_of_a_graph_is_compared(tiny_hybrid, graphs, reference):
    for trace in RUNS["runtime"](request(tiny_hybrid, graphs / "ort")).values():
        result = compare_traces(
            trace, reference, dtype=torch.float32, config=read_config(tiny_hybrid)
        )
        assert set(result.states) == {0, 1, 2}


def test_fault_in_a_graph_is_found(tiny_hybrid, reference, tmp_path):
    wrong = faults.artifact_with(faults.round_a_log, tiny_hybrid, tmp_path / "wrong")
    export_onnx(wrong, tmp_path / "graph")
    trace = RUNS["runtime"](request(tiny_hybrid, tmp_path / "graph"))["prefill"]
    result = compare_traces(trace, reference, dtype=torch.float32, config=read_config(tiny_hybrid))
    assert result.location.name == "layers.2.kda.decay"


def test_graph_is_run_by_everything_that_can(graphs):
    assert is_graph(graphs / "ort")
    assert {runner.module for runner in graph_runners(graphs / "ort", name="g")} == {
        "onnx_runtime",
        "onnx_reference",
        "onnx_genai",
    }


def test_evaluator_declines_what_only_a_runtime_has(tiny_hybrid, graphs):
    module = onnx_reference.__name__
    with pytest.raises(OracleDeclinedError, match="MoE is a runtime's alone"):
        ask_oracle(module, request(tiny_hybrid, graphs / "ort"))
