"""Reading texts and packing them: no token is lost, none is moved, and no more is read than needed."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.errors import InputError, UsageError
from kimi_convert.model import text as text_module
from kimi_convert.model.document import Document
from kimi_convert.model.text import pack_documents, read_documents
from kimi_convert.model.tokenizer import load_tokenizer
from tests.unit.model.tokenizer_folders import MOONLET

VOCAB_SIZE = 1000
SEPARATOR = 999
EXAMPLES = MOONLET.parent / "text"


class CharacterTokenizer:
    """One token per character, by its number."""

    vocab_size = VOCAB_SIZE
    bos_token_id = None
    eos_token_ids = (SEPARATOR,)

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def token_bytes(self, token_id):
        return chr(token_id).encode()


def of_ids(*ids, kind="a"):
    return Document(kind=kind, token_ids=tuple(ids))


def pack(documents, *, separator_id=SEPARATOR, **options):
    return pack_documents(documents, CharacterTokenizer(), separator_id=separator_id, **options)


def joined(rows):
    """Undo the overlap of rows."""
    return [*rows[0].tolist(), *(token for row in rows[1:] for token in row[1:].tolist())]


def streams_of(documents, separator_id):
    streams = {}
    for document in documents:
        ids = list(document.token_ids)
        known = streams.get(document.kind)
        between = [] if known is None or separator_id is None else [separator_id]
        streams[document.kind] = [*(known or []), *between, *ids]
    return streams


DOCUMENTS = st.lists(
    st.builds(
        Document,
        kind=st.sampled_from("abc"),
        token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=20).map(tuple),
    ),
    max_size=12,
)


@given(
    documents=DOCUMENTS,
    length=st.integers(1, 8),
    separator_id=st.sampled_from([None, SEPARATOR]),
)
def test_no_token_is_lost_and_order_is_kept(documents, length, separator_id):
    streams = streams_of(documents, separator_id)
    if all(len(stream) <= length for stream in streams.values()):
        with pytest.raises(InputError, match="not enough text"):
            pack(documents, sequence_length=length, separator_id=separator_id)
        return
    packed = pack(documents, sequence_length=length, separator_id=separator_id)
    assert packed.tokens.dtype == torch.int64
    assert packed.tokens.shape == (len(packed.kinds), length + 1)
    rows = defaultdict(list)
    for kind, row in zip(packed.kinds, packed.tokens, strict=True):
        rows[kind].append(row)
    assert set(packed.left_over) == set(streams)
    for kind, stream in streams.items():
        in_rows = joined(rows[kind]) if rows[kind] else []
        assert stream[: len(in_rows)] == in_rows
        assert len(stream) - len(in_rows) == packed.left_over[kind]
        assert packed.left_over[kind] < length + (not in_rows)
        for row, following in zip(rows[kind], rows[kind][1:], strict=False):
            assert row[-1] == following[0]


@given(
    documents=DOCUMENTS,
    length=st.integers(1, 4),
    in_all=st.none() | st.integers(4, 40),
    per_kind=st.none() | st.integers(4, 20),
)
def test_limits_keep_the_first_rows(documents, length, in_all, per_kind):
    if all(len(stream) <= length for stream in streams_of(documents, SEPARATOR).values()):
        return
    whole = pack(documents, sequence_length=length)
    limited = pack(
        documents, sequence_length=length, max_tokens=in_all, max_tokens_per_kind=per_kind
    )
    expected, counts = [], defaultdict(int)
    for index, kind in enumerate(whole.kinds):
        fits_kind = per_kind is None or (counts[kind] + 1) * length <= per_kind
        fits = in_all is None or (len(expected) + 1) * length <= in_all
        if fits and fits_kind:
            counts[kind] += 1
            expected.append(index)
    assert limited.kinds == tuple(whole.kinds[index] for index in expected)
    assert torch.equal(limited.tokens, whole.tokens[expected])


def test_inputs_and_targets_overlap_by_one():
    packed = pack([of_ids(*range(9))], sequence_length=4)
    assert packed.tokens.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert packed.left_over == {"a": 0}


def test_separator_stands_between_documents_of_a_kind_only():
    documents = [of_ids(1, 2), of_ids(7, kind="b"), of_ids(), of_ids(3)]
    packed = pack(documents, sequence_length=4)
    assert packed.tokens.tolist() == [[1, 2, SEPARATOR, SEPARATOR, 3]]
    assert packed.left_over == {"a": 0, "b": 1}


def test_texts_are_encoded_and_ids_are_taken_as_they_are():
    documents = [Document(kind="a", text="AB"), of_ids(3, 4)]
    assert pack(documents, sequence_length=4).tokens.tolist() == [[65, 66, SEPARATOR, 3, 4]]


def test_ids_need_no_tokenizer():
    packed = pack_documents(
        [of_ids(1, 2, 3)], None, sequence_length=2, separator_id=None, vocab_size=4
    )
    assert packed.tokens.tolist() == [[1, 2, 3]]


def test_nothing_is_read_after_the_last_row_is_full():
    def documents():
        yield of_ids(*range(10))
        raise AssertionError("read on")

    packed = pack(documents(), sequence_length=4, max_tokens=9)
    assert packed.tokens.shape == (2, 5)
    assert packed.left_over == {"a": 1}


def test_a_kind_at_its_limit_is_not_encoded_again():
    documents = [of_ids(1, 2, 3), Document(kind="a", text="\uffff"), of_ids(4, 5, kind="b")]
    packed = pack(documents, sequence_length=1, max_tokens_per_kind=1)
    assert packed.tokens.tolist() == [[1, 2], [4, 5]]
    assert packed.left_over == {"a": 1, "b": 0}


@pytest.mark.parametrize("outside", [-1, VOCAB_SIZE, 2**70])
def test_an_id_out_of_range_is_refused_by_its_place(outside):
    document = Document(token_ids=(1, outside), where="text.jsonl:3")
    with pytest.raises(InputError, match="out of range") as caught:
        pack([document], sequence_length=1)
    assert caught.value.where == "text.jsonl:3"
    assert caught.value.found == str(outside)


def test_a_text_without_a_tokenizer_is_refused():
    document = Document(text="a", where="text.jsonl:3")
    with pytest.raises(InputError, match="needs a tokenizer") as caught:
        pack_documents([document], None, sequence_length=1, separator_id=None, vocab_size=9)
    assert caught.value.where == "text.jsonl:3"


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 0},
        {"sequence_length": 4, "max_tokens": 3},
        {"sequence_length": 4, "max_tokens_per_kind": 0},
        {"sequence_length": 4, "separator_id": VOCAB_SIZE},
        {"sequence_length": 4, "separator_id": -1},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_before_reading(options):
    def documents():
        raise AssertionError("read")
        yield

    with pytest.raises(UsageError):
        pack(documents(), **options)


def test_packing_without_tokenizer_and_size_is_refused():
    with pytest.raises(UsageError, match="needs a tokenizer"):
        pack_documents([], None, sequence_length=1, separator_id=None)


def test_the_example_texts_are_packed_by_kind():
    tokenizer = load_tokenizer(MOONLET)
    packed = pack_documents(
        read_documents(EXAMPLES / "heldout.jsonl"),
        tokenizer,
        sequence_length=256,
        separator_id=tokenizer.eos_token_ids[0],
        max_tokens_per_kind=1024,
    )
    lines = (EXAMPLES / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert {packed.kinds.count(kind) for kind in set(packed.kinds)} == {4}
    assert set(packed.kinds) == {json.loads(line)["kind"] for line in lines}
    assert first["text"].startswith(tokenizer.decode(packed.tokens[0].tolist()))


def test_json_lines_are_read_in_order_with_their_places(tmp_path):
    path = tmp_path / "a.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\n  \n{"kind": "k", "ids": [1, 2]}')
    assert list(read_documents(path)) == [
        Document(kind="text", text="x", where=f"{path}:1"),
        Document(kind="k", token_ids=(1, 2), where=f"{path}:4"),
    ]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert [document.text for document in read_documents(path)] == ["a\u2028b\x85c"]


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbroken\n')
    documents = read_documents(path)
    assert next(documents).text == "x"
    with pytest.raises(InputError, match="not valid JSON") as caught:
        next(documents)
    assert caught.value.where == f"{path}:2"


def test_a_plain_text_is_one_document_to_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("a\r\n\n\fé\n".encode())
    assert list(read_documents(path)) == [Document(text="a\r\n\n\fé\n", where=str(path))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_document_over_the_limit_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_module, "_MAX_DOCUMENT_BYTES", 20)
    path = tmp_path / name
    path.write_text('{"text": "a"}\n{"text": "aaaaaaaaaaaaaaaaaaaa"}\n')
    with pytest.raises(InputError, match="too long"):
        list(read_documents(path))


def test_a_document_at_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "_MAX_DOCUMENT_BYTES", 14)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [document.text for document in read_documents(path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_text_that_is_not_utf8_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8") as caught:
        list(read_documents(path))
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"\x1f\x8b\x08", "gzip"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS")],
    ids=["gzip", "lfs"],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, kind):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_documents(path))
    assert kind in caught.value.found


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["empty", "blank"])
def test_a_file_without_documents_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no documents"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["a.parquet", "a", "a.json"])
def test_other_types_are_refused_at_once(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="of this type"):
        read_documents(tmp_path / name)


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_documents(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(InputError, match="no such file"):
        read_documents(tmp_path / "b.txt")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    documents = read_documents(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        next(documents)
