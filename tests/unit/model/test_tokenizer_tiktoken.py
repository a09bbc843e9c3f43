"""tiktoken.model: how Kimi's tokenizer cuts text, which ids follow the ranks, and bad files."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.errors import TokenizerError
from kimi_convert.model import tokenizer_files, tokenizer_tiktoken
from kimi_convert.model.tokenizer_tiktoken import load_tiktoken_model
from tests.unit.model.tokenizer_folders import (
    SINGLE_BYTES,
    rank_lines,
    write_json,
    write_tiktoken_folder,
)

FIRST_MERGE = len(SINGLE_BYTES)


@pytest.mark.parametrize(
    ("text", "pair", "is_merged"),
    [
        ("中文", "中".encode()[2:] + "文".encode()[:1], True),
        ("中a", "中".encode()[2:] + b"a", False),
        ("a中", b"a" + "中".encode()[:1], False),
        ("éa", "é".encode()[1:] + b"a", True),
        (" a", b" a", True),
        (" 中", b" " + "中".encode()[:1], False),
        ("HELLOworld", b"Ow", True),
        ("helloWorld", b"oW", False),
        ("don't", b"n'", True),
        ("don't", b"'t", True),
        ("DON'T", b"'T", True),
        ("don'x", b"n'", False),
        ("123", b"23", True),
        ("1234", b"34", False),
        ("a1", b"a1", False),
        (" 1", b" 1", False),
        ("a.b", b".b", True),
        ("a..b", b".b", False),
        (" !", b" !", True),
        ("!\n", b"!\n", True),
        ("a\n\nb", b"\n\n", True),
        (" \n", b" \n", True),
        ("\n ", b"\n ", False),
        ("  ", b"  ", True),
        ("  a", b"  ", False),
        ("  a", b" a", True),
    ],
)
def test_pairs_merge_inside_pieces_only(tmp_path, text, pair, is_merged):
    codec = load_tiktoken_model(write_tiktoken_folder(tmp_path, [pair]))
    ids = codec.encode(text)
    assert (FIRST_MERGE in ids) == is_merged
    assert b"".join(codec.token_bytes[i] for i in ids) == text.encode()


def test_merges_follow_their_ranks(tmp_path):
    codec = load_tiktoken_model(write_tiktoken_folder(tmp_path, [b"bc", b"ab", b"abc"]))
    assert codec.encode("abc") == [FIRST_MERGE + 2]
    assert codec.encode("abab") == [FIRST_MERGE + 1] * 2
    assert codec.encode("xbcx") == [ord("x"), FIRST_MERGE, ord("x")]


@pytest.mark.parametrize(
    ("text", "num_merged"),
    [
        pytest.param("b" + "a" * 24_999, 12_499, id="longest-run"),
        pytest.param("b" + "a" * 25_000, 12_499, id="cut-after-25000"),
        pytest.param("b" + "a" * 50_001, 12_499 + 12_500 + 1, id="cut-twice"),
        pytest.param("a " * 20_000 + "aa", 1, id="short-runs"),
        pytest.param(" a" * 199_999 + " aa", 0, id="cut-after-400000"),
        pytest.param(" a" * 199_998 + " aa", 1, id="not-cut-before-400000"),
    ],
)
def test_very_long_texts_are_cut_as_by_the_published_tokenizer(tmp_path, text, num_merged):
    codec = load_tiktoken_model(write_tiktoken_folder(tmp_path, [b"aa"]))
    ids = codec.encode(text)
    assert ids.count(FIRST_MERGE) == num_merged
    assert len(ids) == len(text) - num_merged


@given(st.lists(st.tuples(st.sampled_from(["a", " ", "\n", "中"]), st.integers(1, 60_000))))
def test_no_run_is_handed_over_longer_than_25000(runs):
    text = "".join(character * length for character, length in runs)[:900_000]
    parts = list(tokenizer_tiktoken._parts(text))
    assert "".join(parts) == text
    for part in parts:
        assert len(part) <= 400_000
        assert all(len(run) <= 25_000 for run in (*part.split(), *re.findall(r"\s+", part)))


@pytest.mark.parametrize(
    ("vocab_size", "num_special"),
    [(None, 256), (FIRST_MERGE + 256, 256), (FIRST_MERGE + 3, 3), (FIRST_MERGE + 1000, 256)],
)
def test_special_ids_follow_the_ranks(tmp_path, vocab_size, num_special):
    codec = load_tiktoken_model(write_tiktoken_folder(tmp_path, vocab_size=vocab_size))
    assert sorted(codec.special_ids.values()) == list(
        range(FIRST_MERGE, FIRST_MERGE + num_special)
    )
    assert codec.special_ids["[BOS]"] == FIRST_MERGE
    assert codec.special_ids["[EOS]"] == FIRST_MERGE + 1
    assert codec.special_ids["<|reserved_token_258|>"] == 258
    assert codec.token_bytes[258] == b"<|reserved_token_258|>"


def test_without_a_tokenizer_config_all_special_tokens_are_reserved(tmp_path):
    write_tiktoken_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    codec = load_tiktoken_model(tmp_path)
    assert codec.special_ids == {f"<|reserved_token_{i}|>": i for i in range(256, 512)}


GOOD = rank_lines(SINGLE_BYTES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "a line of tiktoken.model", id="empty"),
        pytest.param(GOOD + b"\n", "a line of tiktoken.model", id="blank-line"),
        pytest.param(GOOD.replace(b"\n", b"\r\n"), "a line of tiktoken.model", id="crlf"),
        pytest.param(GOOD + b"YWI=", "a line of tiktoken.model", id="no-rank"),
        pytest.param(GOOD + b"YWI 256", "a line of tiktoken.model", id="broken-base64"),
        pytest.param(GOOD + b"Y?I= 256", "a line of tiktoken.model", id="not-base64"),
        pytest.param(GOOD + b" 256", "a line of tiktoken.model", id="empty-token"),
        pytest.param(GOOD + b"YWI= -1", "a line of tiktoken.model", id="negative-rank"),
        pytest.param(GOOD + b"YWI= 2_5_6", "a line of tiktoken.model", id="underscores"),
        pytest.param(GOOD + b"YWI= " + b"9" * 5000, "a line of tiktoken.model", id="huge-rank"),
        pytest.param(GOOD + b"YWI= 256 ", "a line of tiktoken.model", id="something-after"),
        pytest.param(GOOD + b"YWFh" * 2000 + b" 256", "a line of", id="huge-token"),
        pytest.param(GOOD + b"YQ== 256", "a token has two ranks", id="token-twice"),
        pytest.param(GOOD + b"YWI= 255", "ranks are not complete", id="rank-twice"),
        pytest.param(GOOD + b"YWI= 257", "ranks are not complete", id="gap"),
        pytest.param(rank_lines(SINGLE_BYTES[:-2]), "single bytes have no rank", id="cut-off"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1", "a line of", id="lfs"),
    ],
)
def test_a_broken_rank_file_is_refused(tmp_path, content, said):
    write_tiktoken_folder(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=said) as caught:
        load_tiktoken_model(tmp_path)
    assert str(tmp_path / "tiktoken.model") in caught.value.where


def test_an_error_in_a_rank_file_names_the_line(tmp_path):
    write_tiktoken_folder(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(GOOD.replace(b"YQ== 97", b"YQ==,97"))
    with pytest.raises(TokenizerError) as caught:
        load_tiktoken_model(tmp_path)
    assert caught.value.where == f"{tmp_path / 'tiktoken.model'}:98"


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "tiktoken.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError) as caught:
        load_tiktoken_model(tmp_path)
    assert "Git LFS" in caught.value.found
    assert "git lfs pull" in caught.value.hint


def test_a_file_over_the_limit_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "_MAX_FILE_BYTES", 100)
    write_tiktoken_folder(tmp_path)
    with pytest.raises(TokenizerError, match="too large"):
        load_tiktoken_model(tmp_path)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"255": {"content": "a"}}, "out of range"),
        ({"300": {"content": "a"}}, "out of range"),
        ({"256": {"content": "a"}, "257": {"content": "a"}}, "have one name"),
        ({"256": {"content": "<|reserved_token_257|>"}}, "have one name"),
        ({"256": {"content": ""}}, "is not valid"),
        ({"256": {"content": 1}}, "is not valid"),
        ({"256": {"content": "\ud800"}}, "is not valid"),
        ({"256": {}}, "is not valid"),
        ({"256": "a"}, "is not valid"),
        ({"-1": {"content": "a"}}, "is not valid"),
        ({"²": {"content": "a"}}, "is not valid"),
        ({"9" * 5000: {"content": "a"}}, "is not valid"),
        ([], "is not valid"),
        (None, "is not valid"),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, str) else None,
)
def test_wrong_special_tokens_are_refused(tmp_path, added, said):
    write_tiktoken_folder(tmp_path, vocab_size=300)
    write_json(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    with pytest.raises(TokenizerError, match=said) as caught:
        load_tiktoken_model(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer_config.json")
