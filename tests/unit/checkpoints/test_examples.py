"""The examples are found in a checkout and in an installed package, and are what they claim."""

from __future__ import annotations

import json
import math

import pytest

from kimi_convert.checkpoints import examples, open_index
from kimi_convert.errors import InputError

FINDERS = {
    "moonlet-7m": examples.example_checkpoint,
    "text/calibration.jsonl": examples.calibration_text,
    "text/heldout.jsonl": examples.heldout_text,
}
TEXTS = [examples.calibration_text, examples.heldout_text]


@pytest.fixture(params=FINDERS)
def name(request):
    return request.param


def test_example_checkpoint_is_whole():
    tensors = open_index(examples.example_checkpoint()).tensors.values()
    assert round(sum(math.prod(tensor.shape) for tensor in tensors) / 1e6, 2) == 7.38
    assert (examples.example_checkpoint() / "tokenizer.json").is_file()


@pytest.mark.parametrize("find", TEXTS, ids=lambda find: find.__name__)
def test_text_holds_one_document_a_line(find):
    lines = find().read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    assert {frozenset(document) for document in documents} == {frozenset({"kind", "text"})}
    assert all(document["text"].strip() for document in documents)


def test_no_document_is_in_both_texts():
    calibration, heldout = (set(find().read_bytes().splitlines()) for find in TEXTS)
    assert not calibration & heldout


def test_installed_example_wins_over_one_beside_the_package(monkeypatch, tmp_path, name):
    installed, beside = tmp_path / "package" / "_examples", tmp_path / "examples"
    for folder in (installed, beside):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    monkeypatch.setattr(examples, "_FOLDERS", (installed, beside))
    assert FINDERS[name]() == installed / name


def test_missing_example_is_an_input_error_that_names_the_places(monkeypatch, tmp_path, name):
    folders = (tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(examples, "_FOLDERS", folders)
    with pytest.raises(InputError) as caught:
        FINDERS[name]()
    assert caught.value.expected == f"{folders[0] / name} or {folders[1] / name}"
    assert "pip install" in caught.value.hint
