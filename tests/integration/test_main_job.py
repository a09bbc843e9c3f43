"""The main job on the example checkpoint, from the command line: everything but the network."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys

import pytest

from kimi_convert.checkpoints.examples import example_checkpoint, heldout_text
from kimi_convert.checkpoints.staging import PARTIAL_FOLDER
from tests.integration.command_line import environment, run_cli, run_here

KDA_LAYERS = [0, 1, 2, 4, 5, 6]
MLA_LAYERS = [3, 7]
MEASURED = ("--text", heldout_text(), "--sequence-length", 256, "--max-tokens", 512)


def document_of(*arguments):
    """Run a command that must succeed and return the one document that it prints."""
    done = run_here(*arguments, "--json")
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    output = tmp_path_factory.mktemp("job") / "hybrid"
    done = run_cli("convert", example_checkpoint(), output, "--no-text", "--json")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    return json.loads(done.stdout), output


@pytest.fixture(scope="module")
def hybrid(conversion):
    return conversion[1]


def test_inspect_finds_nothing_wrong_with_the_example():
    found = document_of("inspect", example_checkpoint())
    assert found["problems"] == []
    assert found["dropped"] == []
    assert [layer["mixer"] for layer in found["layers"]] == ["mla"] * 8


def test_plan_foretells_the_conversion_to_the_byte(conversion):
    converted, output = conversion
    plan = document_of("plan", example_checkpoint())
    assert (plan["kda_layers"], plan["mla_layers"]) == (KDA_LAYERS, MLA_LAYERS)
    weights = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
    assert {file["name"]: file["size"] for file in plan["files"]} == weights
    assert plan["write_bytes"] == sum(weights.values())
    written = json.loads((output / "conversion.json").read_text())
    assert {tensor["name"] for tensor in plan["tensors"]} == set(written["tensors"])
    assert converted["write_bytes"] == plan["write_bytes"]


def test_dry_run_is_the_plan_and_writes_nothing(tmp_path):
    dry = document_of("convert", example_checkpoint(), tmp_path / "hybrid", "--dry-run")
    assert dry == document_of("plan", example_checkpoint())
    assert list(tmp_path.iterdir()) == []


def test_converting_twice_gives_identical_bytes(hybrid, tmp_path):
    document_of("convert", example_checkpoint(), tmp_path / "again", "--no-text")
    assert hashes(tmp_path / "again") == hashes(hybrid)


def test_smaller_files_hold_the_same_tensors(hybrid, tmp_path):
    again = tmp_path / "sharded"
    document_of("convert", example_checkpoint(), again, "--no-text", "--max-shard-size", "4MB")
    assert len(list(again.glob("*.safetensors"))) > 3
    assert all(path.stat().st_size <= 4_000_000 for path in again.glob("*.safetensors"))
    first, second = (
        json.loads((folder / "conversion.json").read_text())["tensors"]
        for folder in (hybrid, again)
    )
    assert second == first


def test_recipe_changes_what_it_says(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[layers]\nkeep = [0, 5]\n")
    plan = document_of("plan", example_checkpoint(), "--recipe", recipe)
    assert plan["mla_layers"] == [0, 5]


def test_hybrid_passes_validation_against_its_teacher(hybrid):
    report = document_of("validate", hybrid, "--teacher", example_checkpoint(), *MEASURED)
    assert report["passed"]
    assert report["findings"] == []
    student, ablated = (report["quality"][key]["overall"] for key in ("student", "ablated"))
    assert student["tokens"] == 512
    assert student["kl"] > 0
    assert ablated["kl"] > 0
    converted = [row["layer_idx"] for row in report["quality"]["layers"] if row["converted"]]
    assert converted == KDA_LAYERS


def test_one_flipped_bit_fails_validation_with_exit_6(hybrid, tmp_path):
    broken = tmp_path / "broken"
    document_of("export", "safetensors", hybrid, broken)
    (path,) = broken.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    done = run_here("validate", broken, "--json")
    assert done.returncode == 6
    report = json.loads(done.stdout)
    assert not report["passed"]
    assert {finding["check"] for finding in report["findings"]} == {"hashes"}


def test_export_changes_the_dtype_and_stays_valid(hybrid, tmp_path):
    exported = tmp_path / "exported"
    options = ("--dtype", "float32", "--max-shard-size", "8MB")
    result = document_of("export", "safetensors", hybrid, exported, *options)
    assert result["dtype"] == "float32"
    assert document_of("validate", exported)["passed"]
    dtypes = document_of("inspect", exported)["dtypes"]
    assert [row["dtype"] for row in dtypes] == ["F32"]


@pytest.mark.parametrize("model", ["teacher", "hybrid"])
def test_both_models_generate(hybrid, model):
    folder = example_checkpoint() if model == "teacher" else hybrid
    done = run_cli("generate", folder, "--prompt", "-", "--max-new-tokens", 8, stdin="The history")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr.startswith("8 tokens in ")


# Stands for a conversion of hours: it stops for a minute while it writes a tensor.
SLOW_CONVERSION = """
import sys, time
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.cli import main

write = ShardWriter.write

def slow_write(self, name, chunks):
    if name == "model.layers.5.self_attn.o_proj.weight":
        print("stopped", flush=True)
        time.sleep(60)
    return write(self, name, chunks)

ShardWriter.write = slow_write
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("existed", [False, True], ids=["new-folder", "empty-folder"])
def test_interrupt_leaves_nothing_and_exits_130(tmp_path, existed):
    output = tmp_path / "made" / "hybrid"
    if existed:
        output.mkdir(parents=True)
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            SLOW_CONVERSION,
            "convert",
            example_checkpoint(),
            output,
            "--no-text",
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "stopped\n"
        assert (output / PARTIAL_FOLDER).is_dir()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "error: interrupted\n")
    assert output.exists() == existed
    if existed:
        assert list(output.iterdir()) == []
    else:
        assert not output.parent.exists()


def test_killed_conversion_does_not_look_like_a_checkpoint_and_can_be_run_again(tmp_path, hybrid):
    output = tmp_path / "hybrid"
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            SLOW_CONVERSION,
            "convert",
            example_checkpoint(),
            output,
            "--no-text",
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "stopped\n"
        process.kill()
    assert run_here("inspect", output).returncode == 3
    document_of("convert", example_checkpoint(), output, "--no-text")
    assert hashes(output) == hashes(hybrid)


def test_plan_of_the_example_takes_no_torch():
    code = (
        "import sys; from kimi_convert.cli import main\n"
        f"assert main(['plan', {str(example_checkpoint())!r}, '--quiet']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
