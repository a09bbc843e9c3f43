"""Text for a calibration: order, amount, and what cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.calibration import CalibrationRecipe, DistillRecipe
from kimi_convert.config.huggingface import read_config
from kimi_convert.conversion.calibration.calibration_text import calibration_text
from kimi_convert.errors import CalibrationError, InputError
from kimi_convert.model.tokenizer import load_tokenizer
from tests.tiny import tiny_config
from tests.unit.model.tokenizer_folders import write_tiktoken_folder

RECIPE = CalibrationRecipe(tokens=640, sequence_length=32, search_tokens=128, validation_tokens=64)


def read(path, seed=0, recipe=RECIPE):
    source = example_checkpoint()
    return calibration_text(path, source, read_config(source), recipe, seed=seed)


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


@pytest.fixture
def many(tmp_path):
    documents = [
        {"text": f"Chapter {n}. " + "The history of the eye is long. " * 3} for n in range(80)
    ]
    return write(tmp_path / "many.jsonl", documents)


def test_rows_are_as_the_recipe_says(many):
    found = read(many)
    assert found.tokens.shape == (20, 33)
    assert found.inputs.shape == (20, 32)
    assert found.validation_rows == 2


def test_order_belongs_to_the_seed(many):
    assert torch.equal(read(many).tokens, read(many).tokens)
    assert not torch.equal(read(many, seed=1).tokens, read(many).tokens)


def test_kinds_of_text_are_mixed(tmp_path):
    documents = [{"kind": kind, "text": f"{kind} " * 40} for kind in ("a", "b") for _ in range(40)]
    assert read(write(tmp_path / "kinds.jsonl", documents)).tokens.shape == (20, 33)


def test_rows_come_from_all_over_the_text(tmp_path):
    documents = [{"ids": [100 + n] * 64} for n in range(200)]
    found = read(write(tmp_path / "documents.jsonl", documents))
    seen = [set(row.tolist()) - {1} for row in found.tokens]
    search, check = seen[:4], seen[-2:]
    assert len(set.union(*search)) >= len(search)
    assert all(not one & other for one in search for other in search if one is not other)
    assert not check[0] & check[1]


def test_validation_rows_are_of_documents_that_fit_nothing(tmp_path):
    documents = [{"ids": [100 + n] * 64} for n in range(200)]
    found = read(write(tmp_path / "documents.jsonl", documents))
    check = found.tokens[-found.validation_rows :]
    for fit in (found.tokens[: -found.validation_rows], found.training):
        assert set(check.unique().tolist()) & set(fit.unique().tolist()) <= {1}


def test_text_that_is_just_long_enough_is_used_whole(tmp_path):
    path = write(tmp_path / "short.jsonl", [{"ids": [100 + n for n in range(641)]}])
    found = read(path)
    assert sorted((found.tokens[:, 0] - 100).tolist()) == list(range(0, 640, 32))
    assert (found.tokens[-2:, 0] - 100).tolist() == [576, 608]  # the end


def test_long_rows_follow_each_other_and_are_not_searched(many):
    found = read(many)
    assert found.long_rows == 8
    assert torch.equal(found.long[1:, 0], found.long[:-1, -1])
    assert torch.equal(found.long, found.tokens[10:18])
    few = replace(RECIPE, search_tokens=544)
    assert read(many, recipe=few).long_rows == 1


def test_rows_are_the_same_however_much_is_trained_on(tmp_path):
    path = write(tmp_path / "long.jsonl", [{"ids": [100 + n for n in range(3800)]}] * 4)
    trained = replace(RECIPE, distill=DistillRecipe(tokens=9600, tokens_per_step=320))
    alone, beside = read(path), read(path, recipe=trained)
    assert torch.equal(alone.tokens, beside.tokens)
    assert alone.training.shape == (140, 32)
    assert beside.training.shape == (140 + 160, 32)
    assert torch.equal(beside.training[:140], alone.training)


def test_token_ids_need_no_words(tmp_path):
    documents = [{"ids": [2000 + n % 7] * 50} for n in range(40)]
    found = read(write(tmp_path / "ids.jsonl", documents))
    assert set(found.tokens.unique().tolist()) <= {1, *range(2000, 2007)}


def test_too_little_text_says_how_much_there_is_and_is_needed(tmp_path):
    path = write(tmp_path / "short.jsonl", [{"ids": [7] * 200}])
    with pytest.raises(CalibrationError, match="too little") as caught:
        read(path)
    assert "640" in caught.value.expected
    assert "192" in caught.value.found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00 not text", "UTF-8|JSON"),
        (b"{broken\n", "not valid JSON"),
        (b"", "no documents"),
        (b'{"ids": [99999999]}\n', "out of range"),
    ],
    ids=["not-utf-8", "not-json", "empty", "id-out-of-range"],
)
def test_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "bad.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"price: 5 \xa3", InputError, "UTF-8"),
        (b"", InputError, "no documents|too little"),
        (b" \n\n ", InputError, "no documents|too little"),
        (b"One line alone.", CalibrationError, "too little"),
    ],
    ids=["not-utf-8", "empty", "blank", "one-line"],
)
def test_plain_text_that_cannot_be_used_is_named(tmp_path, content, error, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert "bad.txt" in str(caught.value)


def test_text_in_a_script_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    path = write(tmp_path / "script.jsonl", [{"text": "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ " * 400}])
    with pytest.raises(CalibrationError, match="does not know the words"):
        read(path)


def test_ids_may_be_of_single_bytes(tmp_path):
    source = example_checkpoint()
    tokenizer = load_tokenizer(source)
    single = [n for n in range(3, 300) if len(tokenizer.token_bytes(n)) == 1]
    documents = [{"ids": (single * 40)[:600]} for _ in range(4)]
    assert read(write(tmp_path / "bytes.jsonl", documents)).tokens.shape == (20, 33)


def test_model_of_bytes_knows_every_script(tmp_path):
    source = write_tiktoken_folder(tmp_path / "bytes")
    config = tiny_config("deepseek_v3", vocab_size=300)
    path = write(tmp_path / "script.jsonl", [{"text": "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ " * 400}])
    found = calibration_text(path, source, config, RECIPE, seed=0)
    assert found.tokens.shape == (20, 33)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing.jsonl")
