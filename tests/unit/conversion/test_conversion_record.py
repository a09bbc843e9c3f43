"""The record of a conversion survives an export, and its hashes become those of the new files."""

from __future__ import annotations

import pytest

import kimi_convert
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard
from kimi_convert.conversion.conversion_record import (
    extend_conversion_record,
    read_conversion_record,
)
from kimi_convert.errors import CheckpointError

RECORD = {"format": 1, "files": {"old": {}}, "tensors": {"x": {"op": "copy"}}, "odd": [1, None]}
FILES = (
    WrittenShard("model-1.safetensors", 9, "a" * 64, {"x": "b" * 64}),
    WrittenFile("config.json", 5, "c" * 64),
)


def extend(record, **changes):
    return extend_conversion_record(record, FILES, changes=changes)


def test_record_is_kept_and_extended():
    extended = extend(RECORD, dtype="float16")
    export = extended.pop("export")
    assert extended == RECORD
    assert export == {
        "format": 2,
        "tool": {"name": "kimi-convert", "version": kimi_convert.__version__},
        "dtype": "float16",
        "earlier": [],
        "files": {
            "model-1.safetensors": {"header_sha256": "a" * 64, "size": 9},
            "config.json": {"sha256": "c" * 64, "size": 5},
        },
        "tensors": {"x": {"sha256": "b" * 64}},
    }


def test_exports_of_exports_are_listed_in_order_without_their_hashes():
    third = extend(extend(extend(RECORD, step=1), step=2), step=3)["export"]
    assert third["step"] == 3
    assert [one["step"] for one in third["earlier"]] == [1, 2]
    assert not [one for one in third["earlier"] if {"files", "tensors", "earlier"} & one.keys()]


def test_folder_without_a_record_has_none(tmp_path):
    assert read_conversion_record(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_record_that_is_not_one_object_is_refused(content, tmp_path):
    (tmp_path / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError):
        read_conversion_record(tmp_path)
