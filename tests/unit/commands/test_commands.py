"""What each command passes on, prints and returns, on tiny checkpoints, in this process."""

from __future__ import annotations

import io
import json
import sys

import pytest
from safetensors.torch import load_file, save_file

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.cli import main
from kimi_convert.commands._options import CheckName
from kimi_convert.conversion import fitted
from kimi_convert.errors import ResourceError
from kimi_convert.validation import Check
from tests.tiny import tiny_config, write_tiny_checkpoint


def run(capsys, *arguments):
    """Return the exit code and what was printed on stdout and stderr."""
    code = main(list(map(str, arguments)))
    told = capsys.readouterr()
    return code, told.out, told.err


def document(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json", "--quiet")
    return code, json.loads(out)


@pytest.fixture(params=["deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_linear"])
def checkpoint(request, tmp_path):
    return write_tiny_checkpoint(tmp_path / "tiny", tiny_config(request.param))


@pytest.fixture
def hybrid(tmp_path):
    return write_tiny_checkpoint(tmp_path / "hybrid", tiny_config("kimi_linear"))


def spoil(folder):
    """Put a NaN into a checkpoint."""
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def test_checks_that_can_be_skipped_are_all_of_them():
    assert set(CheckName) == set(Check)


def test_inspect_shows_every_architecture(capsys, checkpoint):
    code, out, err = run(capsys, "inspect", checkpoint)
    assert (code, err) == (0, "")
    for word in ("parameters", "Layers, counted from 0", "routed experts", "No problem found"):
        assert word in out


def test_inspect_shows_the_layer_map_of_a_hybrid(capsys, hybrid):
    _, out, _ = run(capsys, "inspect", hybrid)
    rows = [line.split()[:3] for line in out.splitlines()]
    assert ["0", "KDA", "dense"] in rows
    assert ["1-2", "KDA", "moe"] in rows
    assert ["3", "MLA", "moe"] in rows
    assert "none (NoPE)" in out


def test_inspect_of_a_checkpoint_with_a_problem_shows_it_and_exits_3(capsys, hybrid):
    (hybrid / "model-00001-of-00002.safetensors").unlink()
    code, out, _ = run(capsys, "inspect", hybrid)
    assert code == 3
    assert "Problem: 1 files that the index names are missing" in out
    code, found = document(capsys, "inspect", hybrid)
    assert code == 3
    assert found["problems"][0]["exit_code"] == 3


def test_inspect_quiet_says_all_by_its_exit_code(capsys, hybrid):
    assert run(capsys, "inspect", hybrid, "--quiet") == (0, "", "")


def test_inspect_shortens_a_long_list_of_files(capsys, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "many", tiny_config("deepseek_v3"), num_shards=14)
    _, out, _ = run(capsys, "inspect", folder)
    assert "and 4 more" in out


@pytest.mark.parametrize(("keep", "said"), [("auto", True), ("released", False), ([1], False)])
def test_plan_says_where_layers_are_still_to_be_chosen(capsys, tmp_path, keep, said):
    source = write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[layers]\nkeep = {json.dumps(keep)}\n")
    code, out, _ = run(capsys, "plan", source, "--recipe", recipe)
    assert code == 0
    assert ("Which 1 layers stay MLA is measured" in out) == said


STOPPED = [
    pytest.param(KeyboardInterrupt(), 130, id="interrupt"),
    pytest.param(ResourceError("disk full"), 5, id="full-disk"),
]


@pytest.mark.parametrize("begun", [False, True], ids=["nothing-kept", "layers-kept"])
@pytest.mark.parametrize(("error", "exit_code"), STOPPED)
def test_convert_that_is_stopped_says_what_is_kept(
    capsys, tmp_path, monkeypatch, error, exit_code, begun
):
    def stopped(source, output, **_):
        if begun:
            fitted.work_folder(output).mkdir()
        raise error

    monkeypatch.setattr(fitted, "convert_checkpoint", stopped)
    code, _, err = run(capsys, "convert", example_checkpoint(), tmp_path / "out")
    assert code == exit_code
    kept = f"finished layers are kept in {tmp_path / 'out.calibration'}: the same command goes on"
    assert (kept in err) == begun


def test_validate_passes_a_whole_checkpoint(capsys, checkpoint):
    code, out, err = run(capsys, "validate", checkpoint)
    assert code == 0
    assert out.endswith("Passed.\n")
    assert "Not checked: quality" in out
    assert err


def test_validate_of_a_damaged_checkpoint_exits_6_and_names_the_tensor(capsys, hybrid):
    spoil(hybrid)
    code, out, _ = run(capsys, "validate", hybrid)
    assert code == 6
    assert "model.embed_tokens.weight" in out
    assert "Failed" in out.splitlines()[-1]
    code, found = document(capsys, "validate", hybrid)
    assert (code, found["passed"]) == (6, False)


def test_validate_passes_its_limits_on(capsys, tmp_path, hybrid):
    text = tmp_path / "ids.jsonl"
    rows = [json.dumps({"kind": kind, "token_ids": list(range(90)) * 3}) for kind in "ab"]
    text.write_text("\n".join(rows))
    limits = ("--sequence-length", 16, "--max-tokens", 96, "--max-tokens-per-kind", 64)
    code, found = document(capsys, "validate", hybrid, "--text", text, *limits)
    assert code == 0
    assert found["text"]["tokens_by_kind"] == {"a": 64, "b": 32}
    assert found["text"]["sequence_length"] == 16


def test_validate_shows_scores_by_kind_and_layer(capsys, tmp_path, hybrid):
    text = tmp_path / "ids.jsonl"
    rows = [json.dumps({"kind": kind, "token_ids": list(range(90))}) for kind in ("prose", "code")]
    text.write_text("\n".join(rows))
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tiny_config("deepseek_v3"))
    code, out, _ = run(
        capsys, "validate", hybrid, "--text", text, "--teacher", teacher, "--sequence-length", 32
    )
    assert code == 0
    for word in ("teacher", "converted mixers switched off", "prose", "code", "KDA"):
        assert word in out
    assert "The converted mixers " in out


def test_export_writes_another_dtype_in_smaller_files(capsys, tmp_path, hybrid):
    output = tmp_path / "exported"
    code, found = document(
        capsys,
        *("export", "safetensors", hybrid, output),
        *("--dtype", "bfloat16", "--max-shard-size", "100kB"),
    )
    assert code == 0
    assert found["dtype"] == "bfloat16"
    shards = list(output.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size <= 100_000 for path in shards)
    assert run(capsys, "inspect", output, "--quiet")[0] == 0


def test_export_keeps_the_dtype_unless_told(capsys, tmp_path, hybrid):
    code, out, _ = run(capsys, "export", "safetensors", hybrid, tmp_path / "exported")
    assert code == 0
    assert ["dtype", "float32"] in [line.split() for line in out.splitlines()]


def test_generate_streams_text_to_stdout_and_counts_on_stderr(capsys):
    code, out, err = run(
        capsys, "generate", example_checkpoint(), "--prompt", "The", "--max-new-tokens", 4
    )
    assert code == 0
    assert out.strip()
    assert err.startswith("4 tokens in ")


def test_generate_gives_the_same_text_in_its_document(capsys):
    arguments = ("generate", example_checkpoint(), "--prompt", "The", "--max-new-tokens", 4)
    _, out, _ = run(capsys, *arguments)
    _, found = document(capsys, *arguments)
    assert out == f"{found['text']}\n"
    assert found["new_tokens"] == 4


def test_generate_passes_sampling_on(capsys):
    arguments = ("generate", example_checkpoint(), "--prompt", "The", "--max-new-tokens", 6)
    sampling = ("--temperature", 1.5, "--top-p", 0.95, "--top-k", 50, "--dtype", "bfloat16")
    _, found = document(capsys, *arguments, *sampling, "--seed", 1)
    assert found["request"] == {
        "prompt": "The",
        "max_new_tokens": 6,
        "temperature": 1.5,
        "top_p": 0.95,
        "top_k": 50,
        "seed": 1,
        "dtype": "bfloat16",
        "device": "cpu",
        "backend": None,
    }
    _, again = document(capsys, *arguments, *sampling, "--seed", 1)
    assert again["text"] == found["text"]


def test_generate_reads_the_prompt_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Thé\n".encode())))
    arguments = ("generate", example_checkpoint(), "--prompt", "-", "--max-new-tokens", 1)
    assert document(capsys, *arguments)[1]["request"]["prompt"] == "Thé"


def test_generate_refuses_a_prompt_that_is_not_text(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    code, found = document(capsys, "generate", example_checkpoint(), "--prompt", "-")
    assert (code, found["error"]["where"]) == (3, "standard input")


@pytest.mark.parametrize(
    "arguments",
    [("--top-p", "0"), ("--temperature", "-1"), ("--max-new-tokens", "0"), ("--dtype", "int8")],
    ids=" ".join,
)
def test_generate_refuses_options_out_of_range(capsys, arguments):
    code, found = document(capsys, "generate", example_checkpoint(), "--prompt", "The", *arguments)
    assert (code, found["error"]["type"]) == (2, "UsageError")


def test_doctor_shows_versions_and_features(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("Python", "free disk here", "torch", "Features"):
        assert word in out
    assert document(capsys, "doctor")[1]["version"]
