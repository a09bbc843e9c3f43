"""Shard plans: order, limits and sizes, to the byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from kimi_convert.checkpoints import shard_plan
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
TENSORS = st.lists(
    st.tuples(
        st.text('abc."é', min_size=1, max_size=9),
        st.sampled_from(["U8", "BF16", "F32", "I64"]),
        SHAPES,
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda row: row[0],
).map(lambda rows: [PlannedTensor(*row) for row in rows])


@given(TENSORS, st.integers(1, 3000))
@settings(max_examples=300)
def test_order_limits_and_sizes_hold(tensors, limit):
    plan = plan_shards(tensors, limit)
    assert [tensor for shard in plan.shards for tensor in shard.tensors] == tensors
    assert plan.total_size == sum(tensor.nbytes for tensor in tensors)
    assert plan.file_bytes == sum(shard.file_bytes for shard in plan.shards)
    for shard in plan.shards:
        assert shard.file_bytes <= limit or len(shard.tensors) == 1
        assert len(shard.header()) == shard.header_bytes
        assert shard.header_bytes % 8 == 0


@given(TENSORS, st.integers(1, 3000))
@settings(max_examples=150)
def test_library_reads_every_planned_file_and_every_tensor_is_aligned(tensors, limit):
    for shard in plan_shards(tensors, limit).shards:
        content = shard.header() + bytes(shard.data_bytes)
        found = {
            name: (item["dtype"], tuple(item["shape"])) for name, item in deserialize(content)
        }
        assert found == {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        header = json.loads(shard.header()[8:])
        for tensor in shard.tensors:
            width = shard_plan.DTYPES[tensor.dtype].width_bytes
            assert header[tensor.name]["data_offsets"][0] % width == 0


@given(TENSORS, st.integers(1, 3000))
@settings(max_examples=50)
def test_files_are_filled_as_far_as_they_go(tensors, limit):
    """Joining a file with the first tensor of the next breaks the limit or the alignment."""
    plan = plan_shards(tensors, limit)
    for shard, following in zip(plan.shards, plan.shards[1:], strict=False):
        first = following.tensors[0]
        joined = plan_shards([*shard.tensors, first], 10**9)
        unaligned = shard.data_bytes % shard_plan.DTYPES[first.dtype].width_bytes != 0
        assert unaligned or joined.shards[0].file_bytes > limit


@given(TENSORS, st.integers(1, 3000))
@settings(max_examples=50)
def test_same_input_gives_the_same_plan(tensors, limit):
    assert plan_shards(tensors, limit) == plan_shards(iter(tensors), limit)


def test_file_names_count_from_one():
    plan = plan_shards([PlannedTensor(name, "U8", (500,)) for name in "abc"], 700)
    assert [shard.file_name for shard in plan.shards] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_one_file_is_numbered_too():
    plan = plan_shards([PlannedTensor("a", "U8", (1,))], 10**9)
    assert [shard.file_name for shard in plan.shards] == ["model-00001-of-00001.safetensors"]


def test_tensor_above_the_limit_gets_a_file_of_its_own():
    tensors = [
        PlannedTensor(name, "U8", (size,)) for name, size in (("a", 5), ("b", 999), ("c", 5))
    ]
    plan = plan_shards(tensors, 500)
    assert [[t.name for t in shard.tensors] for shard in plan.shards] == [["a"], ["b"], ["c"]]


def test_limit_counts_the_header_to_the_byte():
    tensors = [PlannedTensor("a", "U8", (100,)), PlannedTensor("b", "U8", (100,))]
    whole = plan_shards(tensors, 10**9).shards[0].file_bytes
    assert len(plan_shards(tensors, whole).shards) == 1
    assert len(plan_shards(tensors, whole - 1).shards) == 2


def test_unaligned_tensor_begins_a_file():
    tensors = [
        PlannedTensor("odd", "BF16", (3,)),
        PlannedTensor("still narrow", "BF16", (2,)),
        PlannedTensor("wide", "F32", (1,)),
    ]
    plan = plan_shards(tensors, 10**9)
    assert [[t.name for t in s.tensors] for s in plan.shards] == [
        ["odd", "still narrow"],
        ["wide"],
    ]


def test_header_of_a_file_stays_below_the_limit_of_readers(monkeypatch):
    monkeypatch.setattr(shard_plan, "MAX_HEADER_BYTES", 300)
    plan = plan_shards([PlannedTensor(f"t{i}", "U8", (0,)) for i in range(50)], 10**9)
    assert max(shard.header_bytes for shard in plan.shards) <= 300
    assert len(plan.shards) > 1


def test_header_names_the_format_that_loaders_ask_for():
    header = plan_shards([PlannedTensor("a", "U8", (1,))], 99).shards[0].header()
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


def test_index_is_sorted_and_complete():
    tensors = [PlannedTensor(name, "U8", (300,)) for name in ("z", "a", "é")]
    text = plan_shards(tensors, 450).index_json()
    assert text.endswith(b"}\n")
    assert json.loads(text) == {
        "metadata": {"total_size": 900},
        "weight_map": {
            "a": "model-00002-of-00003.safetensors",
            "z": "model-00001-of-00003.safetensors",
            "é": "model-00003-of-00003.safetensors",
        },
    }
    assert text.index(b'"a"') < text.index(b'"z"') < text.index("é".encode())


def test_tensor_planned_twice_is_refused():
    tensor = PlannedTensor("a", "U8", (1,))
    with pytest.raises(CheckpointError, match="'a' is planned twice"):
        plan_shards([tensor, tensor], 99)


def test_no_tensors_is_refused():
    with pytest.raises(CheckpointError, match="no tensors"):
        plan_shards([], 99)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("a", "F4", (1,)),
        ("a", "bfloat16", (1,)),
        ("a", "U8", (-1,)),
        ("", "U8", ()),
        ("a\n", "U8", ()),
    ],
)
def test_tensor_that_nobody_could_read_back_is_refused(name, dtype, shape):
    with pytest.raises(CheckpointError):
        PlannedTensor(name, dtype, shape)
