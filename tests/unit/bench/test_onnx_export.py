"""The measured export is that of the released model's shape, in place and small."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kimi_convert.bench import onnx_export


def test_export_in_place_stays_small():
    # In a process of its own: what this one holds would count into the peak of its children.
    command = [sys.executable, "-m", "kimi_convert.bench.onnx_export", "--layers", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    assert cost["peak_bytes"] < 300e6
    assert cost["written_bytes"] < 1e6


def test_an_export_that_fails_is_one_clear_error(monkeypatch, capfd):
    monkeypatch.setattr(onnx_export, "write_shaped_checkpoint", lambda folder, _: folder.mkdir())
    assert onnx_export.main(["--layers", "2"]) == 6
    assert "the export that was to be measured failed" in capfd.readouterr().err


def test_too_few_layers_are_refused(capsys):
    with pytest.raises(SystemExit):
        onnx_export.main(["--layers", "1"])
    assert "2 or more" in capsys.readouterr().err
