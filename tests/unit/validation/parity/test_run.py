from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from types import ModuleType

import pytest

from kimi_convert.errors import UsageError
from kimi_convert.validation.parity.oracles.process import (
    OracleDeclinedError,
    OracleFailedError,
    OracleRequest,
    ask_oracle,
)
from kimi_convert.validation.parity.process_runners import FlaRunner, OracleRunner
from kimi_convert.validation.parity.run import ParityOptions, compare_implementations
from kimi_convert.validation.parity.runners import RUNNERS
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

FORMS = ParityOptions(against=("recurrent", "decode"), tokens=20, new_tokens=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("r") / "c", tiny_config("kimi_linear"))


def test_every_pair_is_compared_once(checkpoint):
    report = compare_implementations(checkpoint, options=FORMS)
    assert [one.name for one in report.implementations] == ["recurrent", "decode"]
    assert [(pair.first, pair.second) for pair in report.pairs] == [
        ("torch", "recurrent"),
        ("torch", "decode"),
        ("recurrent", "decode"),
    ]
    assert report.passed
    json.dumps(report.to_json())


def test_artifact_is_compared_under_its_folders_name(checkpoint, tmp_path):
    run_here("export", "safetensors", checkpoint, tmp_path / "half", "--dtype", "bfloat16")
    report = compare_implementations(
        checkpoint, [tmp_path / "half"], options=ParityOptions(against=("torch",), tokens=20)
    )
    (found,) = report.implementations
    assert (found.name, found.dtype) == ("half", "bfloat16")
    assert found.comparison.bound > 1e-3
    assert report.passed


def test_artifacts_whose_names_are_taken_go_by_their_paths(checkpoint, tmp_path):
    for name in ("one/out", "other/out", "decode"):
        run_here("export", "safetensors", checkpoint, tmp_path / name)
    artifacts = [tmp_path / name for name in ("one/out", "other/out", "decode")]
    options = ParityOptions(against=("torch",), tokens=8, new_tokens=0)
    report = compare_implementations(checkpoint, artifacts, options=options)
    assert [one.name for one in report.implementations] == list(map(str, artifacts))


def test_library_that_is_not_there_is_said_to_be_absent(checkpoint, monkeypatch):
    monkeypatch.setattr(
        "kimi_convert.validation.parity.process_runners.find_spec", lambda package: None
    )
    options = ParityOptions(against=("transformers",), tokens=20)
    with pytest.raises(UsageError, match="transformers cannot run here") as caught:
        compare_implementations(checkpoint, options=options)
    assert "kimi-convert[oracles]" in str(caught.value)


def test_runtime_that_the_plan_rules_out_is_not_asked(tmp_path):
    config = tiny_config("kimi_linear", q_lora_rank=20)
    folder = write_tiny_checkpoint(tmp_path / "c", config)
    done = run_here("parity", folder, "--against", "mlx-lm", "--tokens", 20)
    assert done.returncode == 2
    assert "full-rank q" in done.stderr


def test_library_that_fails_makes_parity_fail(checkpoint, monkeypatch):
    def fail(module, request):
        raise OracleFailedError("ValueError: no such tensor")

    monkeypatch.setattr("kimi_convert.validation.parity.process_runners.ask_oracle", fail)
    monkeypatch.setattr(
        "kimi_convert.validation.parity.process_runners.find_spec", lambda package: object()
    )
    done = run_here("parity", checkpoint, "--against", "mlx-lm", "--tokens", 20)
    assert done.returncode == 6
    assert "Failed: mlx-lm. ValueError: no such tensor" in done.stdout


def test_library_that_declines_is_absent_unless_it_was_asked_for(checkpoint, monkeypatch):
    def declines(module, request):
        raise OracleDeclinedError("it is too old")

    monkeypatch.setattr("kimi_convert.validation.parity.process_runners.ask_oracle", declines)
    monkeypatch.setattr(
        "kimi_convert.validation.parity.process_runners.find_spec", lambda package: object()
    )
    oracle = next(runner for runner in RUNNERS if runner.name == "mlx-lm")
    monkeypatch.setattr("kimi_convert.validation.parity.run.RUNNERS", (oracle,))
    report = compare_implementations(checkpoint, options=ParityOptions(tokens=20))
    assert [(one.name, one.why, one.failed) for one in report.absent] == [
        ("mlx-lm", "it is too old", False)
    ]
    assert report.passed
    with pytest.raises(UsageError, match="mlx-lm cannot run here"):
        compare_implementations(checkpoint, options=ParityOptions(against=("mlx-lm",), tokens=20))


def test_transformers_without_the_class_declines(checkpoint, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from kimi_convert.validation.parity.oracles import transformers_native

    monkeypatch.setitem(transformers_native.CLASSES, "kimi_linear", "NotYetForCausalLM")
    with pytest.raises(SystemExit):
        transformers_native.load(str(checkpoint))
    assert "has no NotYetForCausalLM" in capsys.readouterr().err


def test_transformers_does_not_see_kernels_that_need_a_gpu(checkpoint, monkeypatch):
    pytest.importorskip("transformers")
    from kimi_convert.validation.parity.oracles import transformers_native

    seen = []

    class Library:
        __version__ = "5"

        def __getattr__(self, name):
            for package in ("fla", "causal_conv1d"):
                with pytest.raises(ModuleNotFoundError):
                    import_module(package)
                seen.append(package)
            raise AttributeError(name)

    there = ModuleType("fla")
    monkeypatch.setitem(sys.modules, "fla", there)
    monkeypatch.setattr(transformers_native, "transformers", Library())
    with pytest.raises(SystemExit):
        transformers_native.load(str(checkpoint))
    assert seen == ["fla", "causal_conv1d"]
    assert sys.modules["fla"] is there
    assert "causal_conv1d" not in sys.modules


def test_process_that_fails_gives_its_last_words(tmp_path):
    request = OracleRequest(folder="", tokens=[[1]], forms=["prefill"], prompt=[], new_tokens=0)
    (tmp_path / "saying.py").write_text("import sys\nsys.exit('no such model')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "PYTHONPATH", str(tmp_path))
        with pytest.raises(OracleFailedError, match=r"^no such model$"):
            ask_oracle("saying", request)


def test_process_does_not_import_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('taken over')\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "asking.py").write_text("import torch, sys\nsys.exit('as it was')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "there"))
    request = OracleRequest(folder="", tokens=[[1]], forms=["prefill"], prompt=[], new_tokens=0)
    with pytest.raises(OracleFailedError, match="as it was"):
        ask_oracle("asking", request)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--against", "pytorch"), "recurrent, pieces"),
        (("--tokens", 1), "tokens is not valid"),
        (("--new-tokens", -1), "new_tokens is not valid"),
        (("--text", "missing.txt"), "missing.txt"),
    ],
)
def test_wrong_arguments_are_refused(checkpoint, arguments, words):
    done = run_here("parity", checkpoint, *arguments)
    assert done.returncode in (2, 3)
    assert words in done.stderr


def test_folder_that_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    for arguments in ([tmp_path], [checkpoint, tmp_path]):
        done = run_here("parity", *arguments, "--json")
        assert done.returncode == 3
        assert json.loads(done.stdout)["error"]["type"] == "ConfigError"


def test_names_are_unique_and_every_oracle_is_a_module():
    names = [runner.name for runner in RUNNERS]
    assert len(set(names)) == len(names)
    assert {r.module for r in RUNNERS if isinstance(r, (FlaRunner, OracleRunner))} == {
        "fla_layer",
        "mlx_lm_model",
        "transformers_native",
    }
