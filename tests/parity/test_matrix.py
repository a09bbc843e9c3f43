"""The example, converted, in everything that runs here: all agree, and the matrix says so."""

from __future__ import annotations

import json

import pytest

from tests.integration.command_line import run_here

MODES = ("prefill", "decode")
LIBRARIES = ("transformers", "mlx-lm", "graph, ONNX Runtime")


@pytest.fixture(scope="module")
def exports(example_hybrid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    calls = {
        "resharded": ("safetensors", "--max-shard-size", "3MB"),
        "float16": ("safetensors", "--dtype", "float16"),
        "graph": ("onnx",),
    }
    for name, (kind, *options) in calls.items():
        done = run_here("export", kind, example_hybrid, folder / name, *options)
        assert done.returncode == 0, done.stderr
    return [folder / name for name in calls]


@pytest.mark.slow
def test_all_implementations_of_the_example_agree(example_hybrid, exports):
    for package in ("transformers", "mlx_lm", "onnxruntime", "onnxruntime_genai"):
        pytest.importorskip(package)
    size = ("--tokens", 32, "--new-tokens", 64)
    done = run_here("parity", example_hybrid, *exports, *size, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    found = {one["name"]: one for one in report["implementations"]}
    ours = {"resharded", "float16", "recurrent", "pieces", "decode", "float64", "bfloat16"}
    theirs = {f"{name}, {mode}" for name in LIBRARIES for mode in MODES}
    genai = "graph, onnxruntime-genai, decode"
    assert found.keys() == {*ours, *theirs, genai}
    assert len(report["pairs"]) == len(found) * (len(found) + 1) // 2
    continued = [one["greedy"] for one in found.values() if one["greedy"]]
    assert len(continued) == 7
    assert all(one["equal"] == 64 or one["gap"] <= one["margin"] for one in continued)
    # Libraries that share nothing with this project, nor most of them with each other.
    for name in (*theirs, genai):
        assert 0 < found[name]["comparison"]["logits"]["relative_error"] <= 1e-5
    absent = {one["name"]: one["why"] for one in report["absent"]}
    assert absent["graph, ONNX's reference evaluator"] == "com.microsoft::MoE is a runtime's alone"
