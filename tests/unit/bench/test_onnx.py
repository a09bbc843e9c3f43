"""The comparison of decoding speeds runs every form once and prints what it found."""

from __future__ import annotations

import json

import pytest

from kimi_convert.bench import onnx as bench
from kimi_convert.exporters.onnx.options import OnnxOptions
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture
def hybrid(tmp_path, monkeypatch):
    """A tiny hybrid, and two graphs of it to measure; transformers takes seconds to start."""
    monkeypatch.setattr(bench, "GRAPHS", {"ort": OnnxOptions(), "again": OnnxOptions()})
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    config = tiny_config("kimi_linear", num_hidden_layers=2)
    return write_tiny_checkpoint(tmp_path / "hybrid", config)


def test_every_form_is_measured_against_our_model(hybrid, capsys):
    assert bench.main([str(hybrid), "--tokens", "3", "--rounds", "3", "--json"]) == 0
    speeds = json.loads(capsys.readouterr().out)["speeds"]
    assert [speed["who"] for speed in speeds] == [bench.TORCH, "ort", "again"]
    assert speeds[0]["times_torch"] == 1
    assert all(speed["tokens_per_second"] > 0 for speed in speeds)


def test_table_has_a_line_for_each(hybrid, capsys):
    assert bench.main([str(hybrid), "--tokens", "2", "--rounds", "1"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["one", "thread", "tokens/s", "x", "torch"]
    assert len(lines) == 3


def test_a_checkpoint_that_is_none_is_one_clear_error(tmp_path, capsys):
    assert bench.main([str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_transformers_answers_in_rounds(tmp_path):
    config = tiny_config("kimi_linear", num_hidden_layers=2)
    checkpoint = write_tiny_checkpoint(tmp_path / "hybrid", config)
    peer = bench._Transformers(checkpoint, 2)
    try:
        assert peer.run() > 0
        assert peer.run() > 0
    finally:
        peer.close()
