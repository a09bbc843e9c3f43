"""A file is as it was written, or it is said what differs."""

from __future__ import annotations

import os

import pytest

from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.checkpoints.written import difference
from kimi_convert.errors import CheckpointError

(SHARD,) = plan_shards(
    [PlannedTensor("a", "U8", (6,)), PlannedTensor("b", "U8", (4,))], 999
).shards


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.fixture
def written(path):
    with ShardWriter(path, SHARD) as writer:
        writer.write("a", b"aaaaaa")
        writer.write("b", b"bbbb")
        return writer.finish()


def test_file_that_was_not_touched_is_the_same(path, written):
    assert difference(path, written) == ""


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"aaaaaa", b"aaaaab", "other bytes of tensor 'a'"),
        (b"bbbb", b"bbab", "other bytes of tensor 'b'"),
        (b'"pt"', b'"np"', "another header"),
        (b'"b"', b'"c"', "another header"),
    ],
)
def test_any_other_byte_is_found(path, written, old, new, found):
    path.write_bytes(path.read_bytes().replace(old, new))
    assert difference(path, written) == found


def test_another_size_is_found(path, written):
    (other,) = plan_shards([PlannedTensor("a", "U8", (6,))], 999).shards
    path.unlink()
    with ShardWriter(path, other) as writer:
        writer.write("a", b"aaaaaa")
    assert difference(path, written) == f"{other.file_bytes} bytes"


def test_file_that_is_cut_off_or_gone_is_an_error(path, written):
    os.truncate(path, written.nbytes - 1)
    with pytest.raises(CheckpointError, match="cut off"):
        difference(path, written)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        difference(path, written)
