"""tokenizer.json: byte level or refused, and nothing in it adds or removes tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from kimi_convert.errors import TokenizerError
from kimi_convert.model.tokenizer_json import load_tokenizer_json
from tests.unit.model.tokenizer_folders import MOONLET

DOCUMENT = json.loads((MOONLET / "tokenizer.json").read_bytes())
CODEC = load_tokenizer_json(MOONLET)


def write(folder, **changes):
    (folder / "tokenizer.json").write_text(json.dumps(DOCUMENT | changes), encoding="utf-8")
    return folder


def test_every_byte_has_a_token():
    tokens = set(CODEC.token_bytes.values())
    assert {bytes((byte,)) for byte in range(256)} <= tokens


@given(text=st.text())
def test_bytes_of_the_tokens_are_the_text(text):
    assert b"".join(CODEC.token_bytes[i] for i in CODEC.encode(text)) == text.encode()


POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 50},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": "<|pad|>",
}


@pytest.mark.parametrize(
    "change",
    [
        {"post_processor": POST_PROCESSOR},
        {"truncation": TRUNCATION},
        {"padding": PADDING},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_file_cannot_add_or_cut_tokens(tmp_path, change):
    codec = load_tokenizer_json(write(tmp_path, **change))
    assert codec.encode("some words of text") == CODEC.encode("some words of text")


def test_added_tokens_decode_to_their_names_whatever_their_characters(tmp_path):
    name = "<é begin▁>"  # é alone would stand for a byte
    added = [
        *DOCUMENT["added_tokens"],
        {**DOCUMENT["added_tokens"][0], "id": 4096, "content": name},
    ]
    codec = load_tokenizer_json(write(tmp_path, added_tokens=added))
    assert codec.token_bytes[4096] == name.encode()
    assert codec.special_ids[name] == 4096


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "EOF"),
        (b"{}", ""),
        (b"\xff", ""),
        (b"[]", ""),
        ((MOONLET / "tokenizer.json").read_bytes()[:-100], "EOF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
    ids=["empty", "no-fields", "not-utf8", "list", "cut-off", "lfs-pointer"],
)
def test_a_broken_file_is_refused(tmp_path, content, found):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="not understood") as caught:
        load_tokenizer_json(tmp_path)
    assert found in caught.value.found
    assert caught.value.hint
    assert caught.value.where == str(tmp_path / "tokenizer.json")


def test_a_decoder_that_is_not_byte_level_is_refused(tmp_path):
    library = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="not byte level"):
        load_tokenizer_json(tmp_path)


def test_an_empty_vocabulary_is_refused(tmp_path):
    library = Tokenizer(BPE())
    library.pre_tokenizer = ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    document = json.loads((tmp_path / "tokenizer.json").read_bytes())
    document["decoder"] = DOCUMENT["decoder"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="vocabulary is empty"):
        load_tokenizer_json(tmp_path)
