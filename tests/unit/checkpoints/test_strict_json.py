"""JSON from untrusted files: one object, bounded, unambiguous."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.checkpoints import strict_json
from kimi_convert.checkpoints.strict_json import parse_object
from kimi_convert.errors import CheckpointError


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
def test_every_plain_object_comes_back(document):
    assert parse_object(json.dumps(document).encode(), where="x") == document


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} x", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is given twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "the key 'a' is given twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b"[]", "a list"),
        (b'"text"', "a str"),
        (b"null", "a NoneType"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!doctype html>", "HTML page"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_everything_else_is_refused(text, said):
    with pytest.raises(CheckpointError) as caught:
        parse_object(text, where="here")
    assert said in str(caught.value)
    assert caught.value.where == "here"


def test_utf_16_is_refused_though_json_loads_takes_it():
    text = json.dumps({"a": 1}).encode("utf-16")
    assert json.loads(text) == {"a": 1}
    with pytest.raises(CheckpointError):
        parse_object(text, where="x")


def test_text_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 10)
    assert parse_object(b'{"a": 234}', where="x") == {"a": 234}
    with pytest.raises(CheckpointError, match="at most 10 bytes"):
        parse_object(b'{"a": 2345}', where="x")


def test_a_flood_of_values_is_refused_in_little_time_and_memory():
    text = b'{"a":[' + b"[]," * 20_000_000 + b"0]}"
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(CheckpointError, match="too many values"):
        parse_object(text, where="x")
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
