"""Small teachers: they learn, what is written is a checkpoint, and held-out text is left out."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from kimi_convert.bench import train_teacher
from kimi_convert.bench.teacher_text import training_tokens
from kimi_convert.bench.train_teacher import Schedule
from kimi_convert.checkpoints.examples import example_checkpoint, heldout_text
from kimi_convert.cli import app
from kimi_convert.model.loading import load_model
from kimi_convert.model.text import read_documents
from kimi_convert.model.tokenizer import load_tokenizer

SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--head-dim", "16"]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "told.py").write_text("told = [n for n in range(40)]\n" * 60)
    return folder


def test_teacher_of_a_wanted_shape_is_a_checkpoint(tmp_path, source):
    output = tmp_path / "teacher"
    training = ["--tokens", "256", "--rows", "2", "--length", "32", "--text", str(source)]
    shape = ["--q-lora-rank", "24", "--eps", "1e-6"]
    assert train_teacher.main([str(output), *SMALL, *shape, *training]) == 0
    model = load_model(output)
    assert (model.config.num_layers, model.config.mla.q_lora_rank) == (2, 24)
    assert model.config.rms_norm_eps == 1e-6
    result = CliRunner().invoke(app, ["inspect", str(output), "--json"])
    assert result.exit_code == 0
    assert train_teacher.main([str(output), *SMALL, *training]) != 0  # it is there already


def test_teacher_is_written_as_it_was_trained(tmp_path):
    document = json.loads((example_checkpoint() / "config.json").read_text())
    document |= {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64}
    model = train_teacher.new_model(document, seed=0)
    tokens = torch.arange(3, 60, dtype=torch.int32).repeat(20)
    schedule = Schedule(steps=40, rows=4, length=16, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_teacher, "_TOLD_EVERY", 39)
        first, last = train_teacher.train(model, tokens, schedule)
    assert last < first - 0.5
    assert model.layers[1].moe.router.bias.abs().max() > 0  # loads were balanced
    train_teacher.write(model, document, tmp_path / "teacher")
    stored = load_model(tmp_path / "teacher").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=2**-8, atol=0)


def test_what_the_bench_judges_on_is_not_trained_on(source):
    tokenizer = load_tokenizer(example_checkpoint())
    held_out = next(read_documents(heldout_text())).text
    (source / "leak.txt").write_text("Before.\n" + held_out[: len(held_out) // 2 + 2000])
    (source / "twin.txt").write_text((source / "told.py").read_text())
    tokens = training_tokens([source], heldout_text(), tokenizer, separator_id=1)
    expected = tokenizer.encode((source / "told.py").read_text())
    assert tokens.tolist() == [*expected, 1]
