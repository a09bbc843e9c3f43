"""Texts become the model's own ids; models that cannot be compared are refused first."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from kimi_convert.errors import CheckpointError, InputError
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.sample import (
    check_comparable,
    leading_tokens,
    random_tokens,
    read_sample,
)
from tests.tiny import tiny_config
from tests.unit.model.tokenizer_folders import EOS, write_tiktoken_folder
from tests.unit.validation.build import HYBRID, TEACHER, write_token_ids

SHORT = ValidationOptions(sequence_length=16)


def write_text(path, *texts):
    lines = [json.dumps({"kind": "prose", "text": text}) for text in texts]
    path.write_text("\n".join(lines))
    return path


def read(path, checkpoint, teacher=None, options=SHORT, vocab_size=300):
    return read_sample(
        path, checkpoint=checkpoint, teacher=teacher, vocab_size=vocab_size, options=options
    )


def test_token_ids_need_no_tokenizer(tmp_path):
    path = write_token_ids(tmp_path / "ids.jsonl", rows={"a": 3, "b": 2})
    sample = read(path, tmp_path)
    facts = sample.facts
    assert sample.packed.tokens.shape == (5, 17)
    assert (facts.sequences, facts.sequence_length, facts.tokens) == (5, 16, 80)
    assert facts.tokens_by_kind == {"a": 48, "b": 32}
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts.path == str(path)


def test_texts_are_encoded_and_joined_by_the_end_token(tmp_path):
    folder = write_tiktoken_folder(tmp_path / "model", vocab_size=258)
    path = write_text(tmp_path / "t.jsonl", "abcdefghij", "klmnopqrst")
    sample = read(path, folder, vocab_size=258)
    expected = [*b"abcdefghij", 257, *b"klmnop"]
    assert EOS == "[EOS]"
    assert sample.packed.tokens.tolist() == [expected]
    assert sample.facts.left_over == {"prose": 4}


def test_tokenizer_of_the_teacher_serves_a_checkpoint_without_one(tmp_path):
    teacher = write_tiktoken_folder(tmp_path / "teacher", vocab_size=258)
    path = write_text(tmp_path / "t.jsonl", "a" * 40)
    (tmp_path / "student").mkdir()
    assert read(path, tmp_path / "student", teacher, vocab_size=258).facts.sequences == 2
    with pytest.raises(InputError, match="tokenizer"):
        read(path, tmp_path / "student", vocab_size=258)


def test_tokenizers_that_give_other_ids_are_refused(tmp_path):
    student = write_tiktoken_folder(tmp_path / "student", [b"ab"])
    teacher = write_tiktoken_folder(tmp_path / "teacher", [b"xy"])
    same = shutil.copytree(student, tmp_path / "same")
    path = write_text(tmp_path / "t.jsonl", "abxy" * 20)
    assert read(path, student, same).facts.sequences == 3
    with pytest.raises(CheckpointError, match="tokenizers that differ"):
        read(path, student, teacher)


def test_limits_count_input_tokens_in_all_and_by_kind(tmp_path):
    path = write_token_ids(tmp_path / "ids.jsonl", rows={"a": 9, "b": 9, "c": 9})
    options = ValidationOptions(sequence_length=16, max_tokens=112, max_tokens_per_kind=50)
    facts = read(path, tmp_path, options=options).facts
    assert facts.tokens_by_kind == {"a": 48, "b": 48, "c": 16}


def test_id_beyond_the_vocabulary_is_refused(tmp_path):
    path = write_token_ids(tmp_path / "ids.jsonl", rows={"a": 3})
    with pytest.raises(InputError, match="out of range"):
        read(path, tmp_path, vocab_size=100)


def test_random_tokens_depend_on_the_seed_alone():
    one, same, other = (
        random_tokens(300, ValidationOptions(seed=seed, consistency_tokens=50))
        for seed in (1, 1, 2)
    )
    assert one.shape == (2, 50)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= int(one.min()) < int(one.max()) < 300


def test_forms_are_compared_on_the_first_tokens_of_a_text(tmp_path):
    sample = read(write_token_ids(tmp_path / "ids.jsonl", rows={"a": 3}), tmp_path)
    options = ValidationOptions(consistency_tokens=10)
    assert torch.equal(leading_tokens(sample, options), sample.packed.tokens[:2, :10])
    assert leading_tokens(sample, ValidationOptions(consistency_tokens=128)).shape == (2, 17)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("vocab_size", {"vocab_size": 301}),
        ("num_layers", {"vocab_size": 300, "num_hidden_layers": 5}),
        ("hidden_size", {"vocab_size": 300, "hidden_size": 48}),
    ],
)
def test_models_of_other_sizes_cannot_be_compared(field, fields):
    check_comparable(HYBRID, TEACHER, where="teacher")
    with pytest.raises(CheckpointError, match=f"differ in {field}"):
        check_comparable(HYBRID, tiny_config("deepseek_v3", **fields), where="teacher")
