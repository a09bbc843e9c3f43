"""The bench of looking up far back, on models that are too small to do so."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_convert.bench import recall, recall_teacher
from kimi_convert.model.loading import load_model
from kimi_convert.model.text import PackedText
from tests.tiny import tiny_config, write_tiny_checkpoint

TEXT = PackedText(
    tokens=torch.randint(3, 96, (3, 81), generator=torch.Generator().manual_seed(0)),
    kinds=("a", "a", "a"),
    left_over={},
)


def test_span_stands_at_both_ends_of_the_context_with_text_between():
    (one,) = recall.probes_at(TEXT, [80], rows=4, marks=frozenset({5}))
    tokens = one.probe.tokens
    assert tokens.shape == (4, 80)
    assert torch.equal(tokens[:, :32], tokens[:, -32:])
    assert torch.equal(tokens[3, 32:-32], TEXT.tokens[0, :16])
    assert one.probe.answers.tolist() == tokens[:, -31:].flatten().tolist()
    assert 5 not in tokens[:, :32]


def test_models_are_run_as_wholes_are(tmp_path):
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tiny_config("deepseek_v3"), seed=1)
    hybrid = write_tiny_checkpoint(tmp_path / "hybrid", tiny_config("kimi_linear"), seed=2)
    probes = recall.probes_at(TEXT, [70, 80], rows=2, marks=frozenset())
    found = recall.reach_of(teacher, hybrid, TEXT, probes)
    assert found.kept == (3,)
    with torch.no_grad():
        expected, ours = (
            load_model(folder)(TEXT.tokens[:, :-1]).log_softmax(-1)[:, 40:]
            for folder in (teacher, hybrid)
        )
    kl = (expected.exp() * (expected - ours)).sum(-1).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    teacher_row, hybrid_row = list(recall.table_of([found]))[2:]
    assert teacher_row.startswith("| teacher |")
    assert hybrid_row.startswith("| 3 (hybrid) |")


def test_teacher_that_looks_up_has_half_a_text_of_copies(tmp_path):
    rows = recall_teacher.copying_rows(8, 128, torch.Generator().manual_seed(1))
    known = sum(
        row[at - 2 : at + 1] in [row[n - 2 : n + 1] for n in range(2, at)]
        for row in rows.tolist()
        for at in range(24, 128)
    )
    assert 0.3 < known / (8 * 104) < 0.8
    recall_teacher.write_text(tmp_path / "text.jsonl", rows)
    lines = (tmp_path / "text.jsonl").read_text().splitlines()
    assert [json.loads(line)["token_ids"] for line in lines] == rows.tolist()


def test_teacher_is_written_as_a_checkpoint_that_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recall_teacher, "_CALIBRATION_ROWS", 2)
    monkeypatch.setattr(recall_teacher, "_HELDOUT_ROWS", 2)
    monkeypatch.setattr(recall_teacher, "_BATCH_TOKENS", 64)
    assert recall_teacher.main([str(tmp_path), "--steps", "2", "--length", "32"]) == 0
    assert "step 1: loss" in capsys.readouterr().err
    model = load_model(tmp_path / "teacher")
    assert model(torch.arange(64, 80)[None]).shape == (1, 16, 259)
