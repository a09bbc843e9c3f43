"""An existing hybrid distilled: its own parts, its record, and the same on two ranks as on one."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.cli import app
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.recipe import load_recipe
from kimi_convert.conversion import engine
from kimi_convert.conversion.calibration import captured, distill
from kimi_convert.conversion.calibration.calibration_text import calibration_text
from kimi_convert.model.loading import load_model
from tests.tiny import tiny_config, write_tiny_checkpoint

LENGTH = 24
RECIPE = f"""
[calibration]
tokens = {30 * LENGTH}
sequence_length = {LENGTH}
search_tokens = {8 * LENGTH}
validation_tokens = {4 * LENGTH}

[distill]
tokens_per_step = {8 * LENGTH}
"""
STEPS = 12


@pytest.fixture
def pair(tmp_path):
    """A teacher whose tokenizer is the example's, a hybrid of it, a text and a recipe."""
    config = tiny_config("deepseek_v3", num_hidden_layers=2, vocab_size=4096)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example_checkpoint() / name, teacher)
    engine.convert_checkpoint(teacher, tmp_path / "hybrid")
    order = random.Random(4)
    rows = ([order.randrange(300, 400) for _ in range(40)] for _ in range(200))
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def arguments(folder, output):
    texts = ["--calibration", str(folder / "ids.jsonl"), "--recipe", str(folder / "recipe.toml")]
    tokens = ["--distill", str(STEPS * 8 * LENGTH)]
    folders = [str(folder / name) for name in ("teacher", "hybrid", output)]
    return ["align", *folders, *texts, *tokens, "--json"]


def distil(folder, output="out"):
    result = CliRunner().invoke(app, arguments(folder, output))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def kl_of(folder, output):
    recipe = load_recipe(folder / "recipe.toml").calibration
    teacher = folder / "teacher"
    text = calibration_text(folder / "ids.jsonl", teacher, read_config(teacher), recipe, seed=0)
    check = text.tokens[-text.validation_rows :, :-1]
    with torch.no_grad():
        expected, found = (
            load_model(path)(check).log_softmax(-1) for path in (teacher, folder / output)
        )
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def test_distilled_hybrid_is_as_near_as_the_report_says(pair):
    told = distil(pair)
    assert told["after"]["kl"] < told["before"]["kl"]
    assert told["distilled"]["taken"]
    assert told["layers"] == []
    assert kl_of(pair, "hybrid") == pytest.approx(told["before"]["kl"], rel=1e-3)
    assert kl_of(pair, "out") == pytest.approx(told["after"]["kl"], rel=1e-3)
    record = json.loads((pair / "out" / "conversion.json").read_text())
    assert record["export"]["aligned"]["distilled"]["steps"] == STEPS


def test_parts_that_are_not_the_teachers_stay_the_hybrids(pair):
    changed = []
    for path in (pair / "hybrid").glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if name.endswith(("post_attention_layernorm.weight", "model.norm.weight")):
                weights[name] = 1.5 * weights[name]
                changed.append(name)
        save_file(weights, path, metadata={"format": "pt"})
    assert len(changed) == 3
    told = distil(pair)
    assert kl_of(pair, "hybrid") == pytest.approx(told["before"]["kl"], rel=1e-3)
    assert kl_of(pair, "out") == pytest.approx(told["after"]["kl"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", ["mixers", "all"])
def test_on_a_gpu_steps_are_replayed_and_the_report_holds_on_a_cpu(pair, parameters, monkeypatch):
    taken = []

    class Seen(captured.CapturedStep):
        def __init__(self, *given):
            super().__init__(*given)
            taken.append(self)

    monkeypatch.setattr(distill, "CapturedStep", Seen)
    many = RECIPE.replace(f"step = {8 * LENGTH}", f"step = {48 * LENGTH}")  # all experts run
    (pair / "recipe.toml").write_text(f'{many}parameters = "{parameters}"\n')
    command = arguments(pair, "out")
    command[command.index("--distill") + 1] = str(STEPS * 48 * LENGTH)
    result = CliRunner().invoke(app, [*command, "--device", "cuda"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert taken[0].replays
    assert told["after"]["kl"] < told["before"]["kl"]
    # Products are bf16 there.
    assert kl_of(pair, "out") == pytest.approx(told["after"]["kl"], rel=0.05)


def on_two_ranks(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("parameters", ["mixers", "all"])
def test_two_ranks_reach_what_one_does(pair, parameters):
    with (pair / "recipe.toml").open("a") as recipe:
        recipe.write(f'parameters = "{parameters}"\n')
    told = distil(pair, "alone")
    done = on_two_ranks("-m", "kimi_convert", *arguments(pair, "together"))
    assert done.returncode == 0, done.stdout + done.stderr
    together = json.loads(done.stdout)  # once: the first rank alone reports
    assert together["after"]["kl"] == pytest.approx(told["after"]["kl"], rel=1e-3)
    for name, value in load_model(pair / "alone").state_dict().items():
        other = load_model(pair / "together").state_dict()[name]
        torch.testing.assert_close(other, value, rtol=1e-2, atol=1e-4)


def test_an_error_on_one_rank_ends_all(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import torch\n"
        "from kimi_convert.conversion.calibration.ranks import joined_ranks\n"
        "with joined_ranks(torch.device('cpu')) as (ranks, _):\n"
        "    if not ranks.is_first:\n"
        "        raise ValueError('one of two')\n"
        "    ranks.wait()\n"
        "    print('went on')\n"
    )
    done = on_two_ranks(script)
    assert done.returncode != 0
    assert "one of two" in done.stderr
    assert "went on" not in done.stdout
