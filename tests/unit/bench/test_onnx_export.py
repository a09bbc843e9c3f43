"""The measured export is that of the released model's shape, in place and small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimi_convert.bench import onnx_export

RELEASED = Path(__file__).parents[2] / "golden" / "configs" / "kimi-linear-48b-a3b.json"


def test_config_is_the_released_one():
    released = json.loads(RELEASED.read_text(encoding="utf-8"))
    measured = onnx_export.document_of(27)
    assert {name: released[name] for name in measured} == measured


def test_export_in_place_stays_small(capsys):
    assert onnx_export.main(["--layers", "4", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["peak_bytes"] < 300e6
    assert cost["written_bytes"] < 1e6


def test_an_export_that_fails_is_one_clear_error(monkeypatch, capfd):
    monkeypatch.setattr(onnx_export, "write_sparse_checkpoint", lambda folder, _: folder.mkdir())
    assert onnx_export.main(["--layers", "2"]) == 6
    assert "the export that was to be measured failed" in capfd.readouterr().err


def test_too_few_layers_are_refused(capsys):
    with pytest.raises(SystemExit):
        onnx_export.main(["--layers", "1"])
    assert "2 or more" in capsys.readouterr().err
