"""Text that a teacher writes: begins with the given text, goes on as the teacher predicts."""

from __future__ import annotations

import torch

from kimi_convert.config.progress import ignore_progress
from kimi_convert.conversion.calibration import written_text
from kimi_convert.conversion.calibration.written_text import rows_side_by_side, written_rows
from kimi_convert.model.loading import load_model
from tests.tiny import tiny_config, write_tiny_checkpoint

LENGTH, ROWS = 40, 70
TEXT = torch.arange(3, 83).repeat(5).view(10, LENGTH)


def written(tmp_path, seed=0, on_progress=ignore_progress):
    config = tiny_config("deepseek_v3", num_hidden_layers=2)
    folder = tmp_path / "teacher"
    if not folder.exists():
        write_tiny_checkpoint(folder, config)
    model = load_model(folder)
    with torch.no_grad():  # predictions that are sure, so that draws can be told
        model.head.weight.mul_(40)
    rows = written_rows(
        lambda tokens, cache: model(tokens, cache)[:, -1],
        config,
        TEXT,
        rows=ROWS,
        seed=seed,
        device=torch.device("cpu"),
        on_progress=on_progress,
    )
    return model, rows


def test_rows_begin_with_the_text_and_follow_the_teacher(tmp_path):
    model, rows = written(tmp_path)
    assert rows.shape == (ROWS, LENGTH)
    beginnings = rows[:, :16]
    assert ((beginnings.diff(dim=1) == 1) | (beginnings.diff(dim=1) == -79)).all()
    assert len(beginnings.unique(dim=0)) > 20
    with torch.no_grad():
        odds = model(rows[:, :-1]).softmax(-1)[:, 15:]
    chosen = odds.gather(-1, rows[:, 16:, None])
    assert chosen.mean() > 0.8 * odds.amax(-1).mean()


def test_rows_depend_on_the_seed_alone(tmp_path):
    _, first = written(tmp_path)
    _, again = written(tmp_path)
    _, other = written(tmp_path, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_side_by_side_fit_into_memory_and_a_single_one_always_runs():
    config = tiny_config("deepseek_v3", num_hidden_layers=2)
    few, many = (rows_side_by_side(config, LENGTH, nbytes) for nbytes in (10**6, 10**8))
    assert 1 < few < many
    assert rows_side_by_side(config, 2 * LENGTH, 10**8) < many
    assert rows_side_by_side(config, LENGTH, 1) == 1
    model_bytes = 2 * 2 * LENGTH * 4 * (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim)
    assert few * model_bytes < 10**6


def test_rows_written_apart_are_told_of_and_all_there(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(written_text, "_BYTES_ON_CPU", 10**6)
    _, rows = written(tmp_path, on_progress=told.append)
    assert rows.shape == (ROWS, LENGTH)
    done = [event.done for event in told]
    assert done == sorted(done)
    assert len(done) > 3
    assert (done[-1], told[-1].total) == (ROWS * LENGTH, ROWS * LENGTH)
