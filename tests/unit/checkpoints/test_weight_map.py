"""An index file names plain files of its own folder and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.checkpoints.weight_map import (
    WeightMap,
    check_agreement,
    checked_shard_name,
    parse_weight_map,
)
from kimi_convert.errors import CheckpointError

PLAIN = [
    "model.safetensors",
    "model-00001-of-00163.safetensors",
    "model 1.safetensors",
    "-.safetensors",
    "模型.safetensors",
    "a..b.safetensors",
    "x" * 243 + ".safetensors",
]
HOSTILE = [
    "../b/model.safetensors",
    "..",
    "../../../../tester/secret/resolve/main/model.safetensors",
    "/etc/model.safetensors",
    "sub/model.safetensors",
    "sub\\model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "C:model.safetensors",
    "%2e%2e%2fmodel.safetensors",
    "model%00.safetensors",
    "model\0.safetensors",
    "model\n.safetensors",
    "model\x1b[2J.safetensors",
    "model\u202e.safetensors",
    "\ud800.safetensors",
    "https://host/model.safetensors",
    "model.safetensors?download=true",
    "model.safetensors#x",
    ".model.safetensors",
    ".safetensors",
    "",
    "model.bin",
    "model.safetensors.exe",
    "model.SAFETENSORS",
    "model.safetensors ",
    "x" * 244 + ".safetensors",
    None,
    1,
    True,
    ["model.safetensors"],
    {"name": "model.safetensors"},
]


def index_text(weight_map, **metadata):
    return json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_file_name_is_taken(name):
    found = parse_weight_map(index_text({"t": name}), where="i")
    assert found.shard_of == {"t": name}


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:40])
def test_anything_else_is_refused(name):
    with pytest.raises(CheckpointError, match="not a plain file of this folder") as caught:
        parse_weight_map(index_text({"good": "model.safetensors", "t": name}), where="i")
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()


@given(st.text())
def test_accepted_name_is_one_visible_path_component(text):
    name = f"{text}.safetensors"
    try:
        checked_shard_name(name, where="i")
    except CheckpointError:
        return
    assert not set(name) & set("/\\:%\0\n")
    assert not name.startswith(".")


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": "model.safetensors"}',
        b"[]",
        b"",
        b"version https://git-lfs.github.com/spec/v1",
        b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        b'{"weight_map": {"": "a.safetensors"}}',
        b'{"weight_map": {"a\\u0000": "a.safetensors"}}',
    ],
)
def test_index_without_a_clean_map_is_refused(text):
    with pytest.raises(CheckpointError):
        parse_weight_map(text, where="i")


@pytest.mark.parametrize(
    ("total_size", "found"),
    [(12, 12), (0, 0), ("12", None), (True, None), (1.5, None), (None, None)],
)
def test_total_size_is_a_whole_number_or_unknown(total_size, found):
    text = index_text({"t": "a.safetensors"}, total_size=total_size)
    assert parse_weight_map(text, where="i").total_size == found


def test_metadata_may_be_missing_or_odd():
    for metadata in (b"", b'"metadata": 3,', b'"metadata": [],'):
        text = b"{" + metadata + b'"weight_map": {"t": "a.safetensors"}}'
        assert parse_weight_map(text, where="i").total_size is None


def test_shards_are_sorted_and_named_once():
    found = parse_weight_map(
        index_text({"a": "z.safetensors", "b": "a.safetensors", "c": "z.safetensors"}), where="i"
    )
    assert found.shards == ["a.safetensors", "z.safetensors"]


MAP = WeightMap({"a": "1.safetensors", "b": "2.safetensors"}, None)


def test_agreement_is_silent():
    check_agreement(MAP, dict(MAP.shard_of), {}, where="i")


@pytest.mark.parametrize(
    ("found", "doubled", "message"),
    [
        ({"a": "1.safetensors"}, {}, "1 tensors are not in the file that the index names"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, {}, "1 tensors are not in the file"),
        (
            {**MAP.shard_of, "c": "1.safetensors", "d": "2.safetensors"},
            {},
            "2 tensors are in a file but not in the index",
        ),
        (dict(MAP.shard_of), {"a": "2.safetensors"}, "1 tensors are in two files"),
    ],
    ids=["missing", "elsewhere", "extra", "doubled"],
)
def test_disagreement_is_counted_and_named(found, doubled, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        check_agreement(MAP, found, doubled, where="i")
    assert caught.value.found


def test_long_lists_are_capped():
    found = {**MAP.shard_of, **{f"x{i}": "1.safetensors" for i in range(22)}}
    with pytest.raises(CheckpointError, match="and 12 more"):
        check_agreement(MAP, found, {}, where="i")
