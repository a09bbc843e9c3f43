"""Tokenizers of checkpoint folders: round trips, roles of ids, and what is carried over."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.errors import TokenizerError
from kimi_convert.model.tokenizer import load_tokenizer, tokenizer_files
from tests.unit.model.tokenizer_folders import MOONLET, write_json, write_tiktoken_folder

WITH_SURROGATES = st.text(st.sampled_from("a é中😀\ud800\udbff\udc00"))
MOONLET_TOKENIZER = load_tokenizer(MOONLET)
LIBRARY = tokenizers.Tokenizer.from_file(str(MOONLET / "tokenizer.json"))


@pytest.fixture
def moonlet(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(MOONLET / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=["tokenizer.json", "tiktoken.model"])
def tokenizer(request, tmp_path_factory):
    if request.param == "tokenizer.json":
        return MOONLET_TOKENIZER
    merges = (b"th", b"the", " é".encode(), "中".encode()[:2], "中".encode())
    return load_tokenizer(write_tiktoken_folder(tmp_path_factory.mktemp("kimi"), merges))


@given(text=st.text())
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=WITH_SURROGATES)
def test_lone_surrogates_become_replacement_characters(tokenizer, text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@given(text=st.text())
def test_all_ids_are_below_the_vocabulary_size(tokenizer, text):
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in tokenizer.encode(text))


@given(data=st.data())
def test_decode_is_the_utf8_of_the_tokens_bytes(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert tokenizer.decode(ids) == joined.decode("utf-8", "replace")


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_names_of_special_tokens_in_a_text_are_plain_text(tokenizer, role):
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_ids[0]}[role]
    name = tokenizer.decode([special])
    assert name
    assert special not in tokenizer.encode(f"a{name}b")
    assert tokenizer.decode(tokenizer.encode(name)) == name


def test_an_empty_text_has_no_ids(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("outside", [-1, 4096, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(outside):
    with pytest.raises(TokenizerError, match="out of range"):
        MOONLET_TOKENIZER.decode([0, outside])


@given(ids=st.lists(st.integers(0, 4095)))
def test_decode_agrees_with_the_tokenizers_library(ids):
    assert MOONLET_TOKENIZER.decode(ids) == LIBRARY.decode(ids, skip_special_tokens=False)


def test_moonlet_has_the_ids_of_its_config():
    assert MOONLET_TOKENIZER.vocab_size == 4096
    assert MOONLET_TOKENIZER.bos_token_id == 0
    assert MOONLET_TOKENIZER.eos_token_ids == (1,)


def test_loading_and_encoding_open_no_connection(moonlet, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)
    kimi = write_tiktoken_folder(tmp_path / "kimi")
    for folder in (moonlet, kimi):
        assert load_tokenizer(folder).encode("text")


def test_tokenizer_json_is_preferred(moonlet):
    expected = load_tokenizer(moonlet).encode("the text")
    write_tiktoken_folder(moonlet)
    assert load_tokenizer(moonlet).encode("the text") == expected


ROLE_FILES = {
    "generation_config.json": {"eos_token_id": [7, 8, 7], "bos_token_id": 9},
    "config.json": {"vocab_size": 4096, "eos_token_id": 5, "bos_token_id": [4]},
    "tokenizer_config.json": {"eos_token": "<|pad|>", "bos_token": {"content": "<|eos|>"}},
    "special_tokens_map.json": {"eos_token": {"content": "<|bos|>"}, "bos_token": "<|pad|>"},
}


@pytest.mark.parametrize(
    ("files", "bos", "eos"),
    [
        pytest.param(list(ROLE_FILES), 9, (7, 8), id="generation_config"),
        pytest.param(list(ROLE_FILES)[1:], 4, (5,), id="config"),
        pytest.param(list(ROLE_FILES)[2:], 1, (2,), id="tokenizer_config"),
        pytest.param(list(ROLE_FILES)[3:], 2, (0,), id="special_tokens_map"),
        pytest.param([], None, (), id="nothing"),
    ],
)
def test_roles_come_from_the_first_file_that_has_them(moonlet, files, bos, eos):
    (moonlet / "config.json").unlink()
    (moonlet / "tokenizer_config.json").unlink()
    for name in files:
        write_json(moonlet, name, ROLE_FILES[name])
    tokenizer = load_tokenizer(moonlet)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (bos, eos)


def test_null_counts_as_not_given(moonlet):
    write_json(moonlet, "generation_config.json", {"eos_token_id": None})
    write_json(moonlet, "config.json", {"eos_token_id": 5})
    assert load_tokenizer(moonlet).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("name", "document", "said"),
    [
        ("generation_config.json", {"eos_token_id": "1"}, "'eos_token_id' is not valid"),
        ("generation_config.json", {"eos_token_id": [True]}, "'eos_token_id' is not valid"),
        ("generation_config.json", {"eos_token_id": 4096}, "eos token ids out of range"),
        ("generation_config.json", {"bos_token_id": -1}, "bos token ids out of range"),
        ("generation_config.json", [1], "not a JSON object"),
        ("config.json", {"vocab_size": "many"}, "'vocab_size' is not valid"),
        ("config.json", {"vocab_size": 0}, "'vocab_size' is not valid"),
        ("config.json", {"vocab_size": 4095}, "token ids out of range"),
        ("tokenizer_config.json", {"eos_token": 1}, "'eos_token' is not valid"),
        ("tokenizer_config.json", {"eos_token": {"id": 1}}, "'eos_token' is not valid"),
        ("tokenizer_config.json", {"eos_token": "</s>"}, "not one of the tokenizer's special"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict | list) else None,
)
def test_a_wrong_declaration_is_refused(moonlet, name, document, said):
    (moonlet / "config.json").unlink()
    write_json(moonlet, "config.json", {"vocab_size": 4096})
    write_json(moonlet, name, document)
    with pytest.raises(TokenizerError, match=said) as caught:
        load_tokenizer(moonlet)
    assert str(moonlet) in caught.value.where


def test_broken_json_is_refused(moonlet):
    (moonlet / "generation_config.json").write_text('{"eos_token_id": 1')
    with pytest.raises(TokenizerError, match="not valid JSON") as caught:
        load_tokenizer(moonlet)
    assert caught.value.where.endswith("generation_config.json")
    assert caught.value.hint


def test_a_vocabulary_larger_than_the_tokenizers_is_its_padding(moonlet):
    write_json(moonlet, "config.json", {"vocab_size": 5000})
    tokenizer = load_tokenizer(moonlet)
    assert tokenizer.vocab_size == 5000
    assert tokenizer.decode([4999]) == "\N{REPLACEMENT CHARACTER}"


def test_without_a_config_the_vocabulary_ends_with_the_last_token(moonlet):
    (moonlet / "config.json").unlink()
    assert load_tokenizer(moonlet).vocab_size == 4096


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    write_json(tmp_path, "tokenizer_config.json", {})
    with pytest.raises(TokenizerError, match="there is no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokenizer_files_are_data_that_exist(tmp_path):
    for name in ("tokenizer_config.json", "tiktoken.model", "chat_template.jinja"):
        (tmp_path / name).touch()
    for name in ("tokenization_kimi.py", "config.json", "generation_config.json", "README.md"):
        (tmp_path / name).touch()
    (tmp_path / "merges.txt").mkdir()
    expected = ("tokenizer_config.json", "tiktoken.model", "chat_template.jinja")
    assert tokenizer_files(tmp_path) == expected
    assert tokenizer_files(MOONLET) == ("tokenizer.json", "tokenizer_config.json")


def test_files_listed_are_enough_to_load_the_tokenizer(tmp_path):
    source = write_tiktoken_folder(tmp_path / "source", [b"th"])
    target = tmp_path / "target"
    target.mkdir()
    for name in tokenizer_files(source):
        shutil.copy(source / name, target)
    assert load_tokenizer(target).encode("the") == load_tokenizer(source).encode("the")
