"""The folder of finished layers: whole parts, one run, clear errors."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.errors import OutputError

TENSORS = {"kda.q.weight": torch.arange(6.0).reshape(2, 3), "lags": torch.ones(4)}
RECORD = {"error": 0.25, "choices": [{"beta": "0.1"}]}


@pytest.fixture
def store(tmp_path):
    return CalibrationStore(tmp_path / "a" / "work", "digest")


def test_part_comes_back_as_it_was(store):
    assert not store.has("search-0001")
    store.save("search-0001", TENSORS, RECORD)
    assert store.has("search-0001")
    found = store.tensors("search-0001")
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert torch.equal(store.tensor("search-0001", "lags"), TENSORS["lags"])
    assert store.record("search-0001") == RECORD


def test_same_run_finds_its_parts_again(store):
    store.save("search-0001", TENSORS, RECORD)
    again = CalibrationStore(store.folder, "digest")
    assert again.has("search-0001")


def test_another_run_is_refused_and_nothing_is_lost(store):
    store.save("search-0001", TENSORS, RECORD)
    with pytest.raises(OutputError, match="another conversion") as caught:
        CalibrationStore(store.folder, "other")
    assert "Delete" in caught.value.hint
    assert store.has("search-0001")


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="taken"):
        CalibrationStore(tmp_path, "digest")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"digest": 3}'])
def test_broken_state_is_another_run(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(OutputError, match="another conversion"):
        CalibrationStore(tmp_path, "digest")


@pytest.mark.parametrize("kept", [0, 7, 40])
def test_cut_part_is_one_clear_error(store, kept):
    store.save("search-0001", TENSORS, RECORD)
    path = store.folder / "search-0001.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(OutputError, match="cannot be read") as caught:
        store.tensors("search-0001")
    assert str(store.folder) in caught.value.hint


def test_write_that_fails_leaves_no_part(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Exception, match="cannot be written"):
        store.save("search-0001", TENSORS, RECORD)
    assert not store.has("search-0001")


def test_state_names_the_run(store):
    assert json.loads((store.folder / "calibration.json").read_text()) == {"digest": "digest"}


def test_removed_store_leaves_nothing(store):
    store.save("search-0001", TENSORS, RECORD)
    store.remove()
    assert not store.folder.exists()
