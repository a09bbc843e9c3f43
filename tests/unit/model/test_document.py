"""One line of JSON is one document, or an error that names the line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.errors import InputError
from kimi_convert.model.document import Document, parse_document

WHERE = "text.jsonl:7"


@given(text=st.text(), kind=st.text())
def test_any_text_and_kind_are_read_back(text, kind):
    line = json.dumps({"kind": kind, "text": text})
    assert parse_document(line, where=WHERE) == Document(kind=kind, text=text, where=WHERE)


@pytest.mark.parametrize("field", ["ids", "token_ids"])
@given(ids=st.lists(st.integers()))
def test_any_ids_are_read_back(field, ids):
    expected = Document(token_ids=tuple(ids), where=WHERE)
    assert parse_document(json.dumps({field: ids}), where=WHERE) == expected


def test_other_fields_are_ignored():
    line = json.dumps({"text": "a", "url": "b", "meta": {"ids": [1]}})
    assert parse_document(line, where=WHERE) == Document(kind="text", text="a", where=WHERE)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("plain words", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"ids": [1' + "0" * 5000 + "]}", "not valid JSON"),
        ('"text"', "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("{}", "one text or one list"),
        ('{"kind": "a"}', "one text or one list"),
        ('{"text": "a", "ids": [1]}', "one text or one list"),
        ('{"ids": [1], "token_ids": [1]}', "one text or one list"),
        ('{"text": null}', '"text" is not valid'),
        ('{"text": 1}', '"text" is not valid'),
        ('{"text": "a", "kind": null}', '"kind" is not valid'),
        ('{"text": "a", "kind": ["a"]}', '"kind" is not valid'),
        ('{"ids": 1}', '"ids" is not valid'),
        ('{"ids": [1.0]}', '"ids" is not valid'),
        ('{"ids": [true]}', '"ids" is not valid'),
        ('{"token_ids": ["1"]}', '"token_ids" is not valid'),
        ('{"token_ids": [[1]]}', '"token_ids" is not valid'),
    ],
    ids=lambda value: value[:40],
)
def test_a_wrong_line_is_refused_by_its_place(line, said):
    with pytest.raises(InputError, match=said) as caught:
        parse_document(line, where=WHERE)
    assert caught.value.where == WHERE
    assert len(str(caught.value)) < 500
