"""The example, converted, in everything that runs here: all agree, and the matrix says so."""

from __future__ import annotations

import json

import pytest

from tests.integration.command_line import run_here


@pytest.fixture(scope="module")
def exports(example_hybrid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    calls = {
        "resharded": ("--max-shard-size", "3MB"),
        "float32": ("--dtype", "float32"),
        "float16": ("--dtype", "float16"),
    }
    for name, options in calls.items():
        done = run_here("export", "safetensors", example_hybrid, folder / name, *options)
        assert done.returncode == 0, done.stderr
    return [folder / name for name in calls]


@pytest.mark.slow
def test_all_implementations_of_the_example_agree(example_hybrid, exports):
    pytest.importorskip("transformers")
    pytest.importorskip("mlx_lm")
    size = ("--tokens", 32, "--new-tokens", 64)
    done = run_here("parity", example_hybrid, *exports, *size, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    found = {one["name"]: one for one in report["implementations"]}
    forms = {"recurrent", "pieces", "decode", "float64", "bfloat16"}
    libraries = {f"{name}, {form}" for name in ("transformers", "mlx-lm") for form in MODES}
    assert found.keys() == {*(path.name for path in exports), *forms, *libraries}
    assert len(report["pairs"]) == len(found) * (len(found) + 1) // 2
    continued = [one["greedy"] for one in found.values() if one["greedy"]]
    assert len(continued) == 6
    assert all(one["equal"] == 64 or one["gap"] <= one["margin"] for one in continued)
    # Two libraries that share nothing with this project, nor with each other.
    for name in libraries:
        assert 0 < found[name]["comparison"]["logits"]["relative_error"] <= 1e-5


MODES = ("prefill", "decode")
