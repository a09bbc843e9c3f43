"""Headers: what the library writes is read the same; what no one should write is refused."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

from kimi_convert.checkpoints.dtypes import DTYPES, torch_dtype
from kimi_convert.checkpoints.file_kinds import SNIFF_BYTES
from kimi_convert.checkpoints.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorSpec,
    check_tensor_name,
    encode_entry,
    encode_header,
    padded_header_bytes,
    parse_header,
    parse_length,
    read_header,
)
from kimi_convert.errors import CheckpointError
from tests.unit.checkpoints.raw_files import entry, raw_file

NAMES = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1
).filter(lambda name: name != "__metadata__")
# safetensors 0.8 cannot save float8_e8m0fnu.
SAVED = [name for name in DTYPES if name != "F8_E8M0"]


def parse(content):
    """Parse a whole file that is held in memory."""
    nbytes = parse_length(content[:SNIFF_BYTES], file_bytes=len(content), where="f")
    text = content[LENGTH_BYTES : LENGTH_BYTES + nbytes]
    return parse_header(text, shard="f", file_bytes=len(content), where="f")


def refused(content):
    with pytest.raises(CheckpointError) as caught:
        parse(content)
    return caught.value


@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(SAVED), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=8,
    ),
    st.dictionaries(st.text(), st.text(), max_size=3),
)
@settings(max_examples=60)
def test_header_says_what_the_library_says(shapes, metadata):
    tensors = {
        name: torch.zeros(shape, dtype=torch_dtype(dtype))
        for name, (dtype, shape) in shapes.items()
    }
    content = save(tensors, metadata)
    specs, found_metadata = parse(content)
    assert found_metadata == metadata
    ours = {
        spec.name: (spec.dtype, list(spec.shape), content[spec.start : spec.end]) for spec in specs
    }
    theirs = {
        name: (item["dtype"], item["shape"], bytes(item["data"]))
        for name, item in deserialize(content)
    }
    assert ours == theirs


def test_specs_hold_absolute_offsets_and_the_shard():
    content = raw_file({"b": entry("I16", [2], 4, 8), "a": entry("U8", [2, 2], 0, 4)}, bytes(8))
    start = len(content) - 8
    specs, _ = parse(content)
    assert specs == (
        TensorSpec("a", "U8", (2, 2), "f", start, start + 4),
        TensorSpec("b", "I16", (2,), "f", start + 4, start + 8),
    )
    assert [spec.nbytes for spec in specs] == [4, 4]


def test_scalar_and_empty_tensors_and_padding_are_taken():
    header = {"s": entry("U8", [], 0, 1), "e": entry("F32", [0, 7], 1, 1)}
    specs, _ = parse(raw_file(json.dumps(header).encode() + b"   ", b"x"))
    assert [(spec.name, spec.shape, spec.nbytes) for spec in specs] == [
        ("s", (), 1),
        ("e", (0, 7), 0),
    ]


GOOD = {"t": entry()}
TEXT = b'"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
BAD_HEADERS = {
    "overlap": ({"a": entry(end=4), "b": entry(begin=2, end=6)}, 6, "overlap"),
    "alias": ({"a": entry(), "b": entry()}, 4, "overlap"),
    "empty inside another": ({"a": entry(), "b": entry("U8", [0], 2, 2)}, 4, "overlap"),
    "hole": ({"a": entry(), "b": entry(begin=5, end=9)}, 9, "belong to none"),
    "hole at start": ({"a": entry(begin=1, end=5)}, 5, "belong to none"),
    "trailing bytes": (GOOD, 5, "longer than its tensors"),
    "begin after end": ({"t": entry("U8", [4], 4, 0)}, 4, "-4 bytes"),
    "shape and offsets differ": ({"t": entry("F32", [4], 0, 4)}, 4, "16 bytes for F32"),
    "negative size": ({"t": entry("U8", [-2, -2])}, 4, "whole numbers"),
    "size true": ({"t": entry("U8", [True, 4])}, 4, "whole numbers"),
    "size 4.0": ({"t": entry("U8", [4.0])}, 4, "whole numbers"),
    "size as text": ({"t": entry("U8", ["4"])}, 4, "whole numbers"),
    "size above 63 bits": ({"t": entry("U8", [2**64, 0], 0, 0)}, 0, "whole numbers"),
    "product overflows": ({"t": entry("U8", [2**62, 4, 4])}, 4, "is not valid"),
    "too many axes": ({"t": entry("U8", [1] * 65, 0, 1)}, 1, "up to 64"),
    "shape null": ({"t": {**entry(), "shape": None}}, 4, "whole numbers"),
    "three offsets": ({"t": {**entry(), "data_offsets": [0, 4, 4]}}, 4, "[begin, end]"),
    "no offsets": ({"t": {**entry(), "data_offsets": []}}, 4, "[begin, end]"),
    "offset false": ({"t": {**entry(), "data_offsets": [False, 4]}}, 4, "[begin, end]"),
    "unknown dtype": ({"t": entry("F4")}, 4, "one of the dtypes"),
    "dtype in lower case": ({"t": entry("u8")}, 4, "one of the dtypes"),
    "dtype a list": ({"t": {**entry(), "dtype": ["U8"]}}, 4, "one of the dtypes"),
    "unknown field": ({"t": {**entry(), "more": 1}}, 4, "the fields"),
    "missing field": ({"t": {"dtype": "U8", "shape": [4]}}, 4, "the fields"),
    "entry a list": ({"t": [0, 4]}, 4, "the fields"),
    "metadata a list": ({"__metadata__": [], **GOOD}, 4, "not an object"),
    "metadata number": ({"__metadata__": {"a": 1}, **GOOD}, 4, "not a string"),
    "metadata nested": ({"__metadata__": {"a": {}}, **GOOD}, 4, "not a string"),
    "empty name": ({"": entry()}, 4, "tensor name"),
    "name with NUL": ({"a\0b": entry()}, 4, "tensor name"),
    "name with escape code": ({"a\x1b[2J": entry()}, 4, "tensor name"),
    "name climbs": ({"../../etc/passwd": entry()}, 4, "tensor name"),
    "name climbs backwards": ({"a\\..\\b": entry()}, 4, "tensor name"),
    "name too long": ({"n" * 513: entry()}, 4, "tensor name"),
    "name a lone surrogate": (
        b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        4,
        "tensor name",
    ),
    "key twice": (b"{%b,%b}" % (TEXT, TEXT), 4, "given twice"),
    "not UTF-8": (b'{"\xff":1}', 0, "not valid JSON"),
    "not JSON": (b"{nonsense}", 0, "not valid JSON"),
}


@pytest.mark.parametrize(("header", "data", "said"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header_is_refused(header, data, said):
    error = refused(raw_file(header, bytes(data)))
    assert said in str(error)
    assert error.where == "f"


@pytest.mark.parametrize("name", ["", "__metadata__", "a\0", "../a", "a\n", "n" * 513, "\ud800"])
def test_name_that_cannot_be_read_back_is_refused(name):
    with pytest.raises(CheckpointError, match="tensor name"):
        check_tensor_name(name, where="plan")


@pytest.mark.parametrize("name", ["a..b", "a/b", "..a", "模型.weight", "with space"])
def test_odd_but_harmless_name_is_taken(name):
    check_tensor_name(name, where="plan")


def test_name_at_the_limit_is_taken():
    specs, _ = parse(raw_file({"n" * 512: entry()}, bytes(4)))
    assert len(specs[0].name) == 512


BAD_STARTS = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "eight zeros": (b"\0" * 8, "not a safetensors file"),
    "length 2^63": (raw_file(b"{}", declared=2**63), "not a safetensors file"),
    "length above the limit": (
        raw_file(b"{}", declared=MAX_HEADER_BYTES + 1),
        "not a safetensors",
    ),
    "length past the end": (raw_file(b"{}", declared=3), "at least 11 bytes, found 10 bytes"),
    "length and nothing": (struct.pack("<Q", 100), "is cut off"),
    "list": (raw_file(b"[]"), "not a safetensors file"),
    "leading space": (raw_file(b" {}"), "not a safetensors file"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "Git LFS pointer",
    ),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x04\x95\x01\x00\x00\x00\x00" + bytes(999), "pickle"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + bytes(600_000), "gzip"),
    "noise": (b"\x93" * 100, "starts with"),
}


@pytest.mark.parametrize(("content", "said"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_other_file_is_refused_and_named(content, said):
    assert said in str(refused(content))


def test_git_lfs_pointer_has_the_command_as_hint():
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    assert "git lfs pull" in refused(content).hint


@pytest.mark.parametrize("kept", range(8, 120, 7))
def test_truncated_file_says_what_was_expected_and_found(kept):
    whole = raw_file({"t": entry("U8", [64], 0, 64)}, bytes(64))
    error = refused(whole[:kept])
    assert error.message == "file is cut off"
    assert f"{kept} bytes" in error.found
    assert str(len(whole)) in error.expected or error.expected.startswith("at least")


def test_a_million_tensors_in_one_header_are_refused_at_once():
    row = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    content = raw_file(b"{" + b",".join(row % number for number in range(1_000_000)) + b"}")
    began = time.process_time()
    assert "too many values" in str(refused(content))
    assert time.process_time() - began < 1


def test_read_header_reports_size_and_time_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"__metadata__": {"format": "pt"}, **GOOD}, bytes(4)))
    header = read_header(path)
    assert [spec.shard for spec in header.tensors] == ["x.safetensors"]
    assert header.metadata == {"format": "pt"}
    assert header.file_bytes == path.stat().st_size
    assert header.mtime_ns == path.stat().st_mtime_ns


@given(
    st.lists(st.tuples(NAMES, st.sampled_from(SAVED), st.integers(0, 3)), max_size=6),
    st.dictionaries(st.text(), st.text(), min_size=1, max_size=2),
)
def test_encoded_header_is_read_by_us_and_by_the_library(rows, metadata):
    unique = list({name: (name, dtype, size) for name, dtype, size in rows}.values())
    entries, at = [], 0
    for name, dtype, size in unique:
        end = at + size * DTYPES[dtype].width_bytes
        entries.append(encode_entry(name, dtype=dtype, shape=[size], start=at, end=end))
        at = end
    content = encode_header(entries, metadata=metadata) + bytes(at)
    assert (len(content) - at) % 8 == 0
    specs, found = parse(content)
    assert found == metadata
    assert sorted((s.name, s.dtype, s.shape[0]) for s in specs) == sorted(unique)
    assert {name for name, _ in deserialize(content)} == {name for name, _, _ in unique}


def test_encoded_header_is_that_of_the_library():
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        'b"é': torch.zeros((), dtype=torch.bfloat16),
    }
    entries = [
        encode_entry("a", dtype="BF16", shape=(2, 3), start=0, end=12),
        encode_entry('b"é', dtype="BF16", shape=(), start=12, end=14),
    ]
    assert encode_header(entries, metadata={"format": "pt"}) + bytes(14) == save(
        tensors, {"format": "pt"}
    )


@pytest.mark.parametrize("text", range(20))
def test_padded_size_is_that_of_the_encoded_header(text):
    metadata = {"k": "v" * text}
    inner = len(json.dumps({"__metadata__": metadata}, separators=(",", ":"))) - 2
    assert padded_header_bytes(inner) == len(encode_header([], metadata=metadata))


SEED = raw_file(
    {
        "__metadata__": {"format": "pt"},
        "a.b": entry("BF16", [2, 3], 0, 12),
        "c": entry("F32", [1], 12, 16),
    },
    bytes(range(16)),
)
MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(SEED)), st.integers(0, 3), st.binary(max_size=3)), max_size=6
)


def mutated(mutations):
    content = SEED
    for at, removed, added in mutations:
        content = content[:at] + added + content[at + removed :]
    return content


@given(MUTATIONS)
@settings(max_examples=1500, deadline=None)
@example([])
def test_mutated_file_is_read_as_the_library_reads_it_or_refused(mutations):
    content = mutated(mutations)
    try:
        specs, _ = parse(content)
    except CheckpointError:
        return
    theirs = dict(deserialize(content))
    assert {spec.name: content[spec.start : spec.end] for spec in specs} == {
        name: bytes(item["data"]) for name, item in theirs.items()
    }


@given(MUTATIONS)
@settings(max_examples=300, deadline=None)
def test_mutated_file_on_disk_raises_nothing_but_a_checkpoint_error(tmp_path_factory, mutations):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(mutated(mutations))
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert header.file_bytes == path.stat().st_size


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_random_bytes_raise_nothing_but_a_checkpoint_error(content):
    refused(content)
