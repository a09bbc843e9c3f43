"""Files laid out so that blocks can be shared: still valid, still as large as allowed, and worth it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.safetensors_header import TensorSpec, read_header
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.shared_layout import share_layout, shared_bytes

MB = 2**20
LIMIT = 10**9


def matrix(name, megabytes=20):
    return PlannedTensor(name, "U8", (megabytes, MB))


def stored(tensor, start):
    return TensorSpec(tensor.name, tensor.dtype, tensor.shape, "x", start, start + tensor.nbytes)


def laid_out(tensors, starts, limit=LIMIT):
    sources = {t.name: stored(t, starts[t.name]) for t in tensors if t.name in starts}
    plan = plan_shards(tensors, limit)
    return plan, share_layout(plan, sources, limit), sources


def starts_of(shard):
    """Return where each tensor begins in the file."""
    at, found = shard.header_bytes, {}
    for tensor in shard.tensors:
        found[tensor.name] = at
        at += tensor.nbytes
    return found


@pytest.mark.parametrize("start", [8, 72, 1000, 4096, 5000])
def test_header_is_padded_until_the_tensor_lies_as_in_its_source(start):
    _, plan, _ = laid_out([matrix("a")], {"a": start})
    (shard,) = plan.shards
    assert starts_of(shard)["a"] % 4096 == start % 4096
    assert len(shard.header()) == shard.header_bytes


def test_most_bytes_win():
    tensors = [matrix("a"), matrix("b", 50), matrix("c")]
    _, plan, sources = laid_out(tensors, {"a": 1000, "b": 2000, "c": 1000})
    assert starts_of(plan.shards[0])["b"] % 4096 == 2000
    assert shared_bytes(plan.shards[0], sources) == 50 * MB - 8192
    tensors[2] = matrix("c", 31)
    _, plan, sources = laid_out(tensors, {"a": 1000, "b": 2000, "c": 1000})
    assert shared_bytes(plan.shards[0], sources) == 51 * MB - 2 * 8192


def test_tensors_that_fill_no_whole_blocks_go_last_where_that_pays():
    """As FP8 blocks with their scales: stored apart in the source, side by side in the plan."""
    tensors, starts = [], {}
    for number in range(4):
        value, scale = matrix(f"{number}"), PlannedTensor(f"{number}_scale", "F32", (16, 56))
        tensors += [value, scale]
        starts |= {value.name: 6000 + number * value.nbytes, scale.name: 200}
    before, plan, sources = laid_out(tensors, starts)
    (shard,) = plan.shards
    assert [t.name for t in shard.tensors[:4]] == ["0", "1", "2", "3"]
    assert shared_bytes(before.shards[0], sources) == 0
    assert shared_bytes(shard, sources) == 80 * MB - 4 * 8192


def test_file_stays_as_it_is_where_little_or_nothing_would_be_gained():
    tensors = [matrix("a"), matrix("b")]
    for starts in ({}, {"a": 1001}, {"a": 3}):  # tensors at odd places cannot be reached
        before, plan, _ = laid_out(tensors, starts)
        assert plan == before
    small = [PlannedTensor(str(n), "U8", (MB // 2,)) for n in range(100)]
    before, plan, _ = laid_out(small, {t.name: 1000 for t in small})
    assert plan == before
    before, plan, _ = laid_out([matrix("a", 15)], {"a": 1000})
    assert plan == before


def test_file_that_lies_as_its_source_is_laid_out_the_same_again():
    tensors = [PlannedTensor("v", "BF16", (3,)), matrix("a"), matrix("b")]
    _, first, _ = laid_out(tensors, {"a": 1000, "b": 1000 + 20 * MB})
    _, second, _ = laid_out(tensors, starts_of(first.shards[0]))
    assert second == first


def test_file_is_never_larger_than_asked_for():
    tensors = [matrix("a")]
    size = plan_shards(tensors, LIMIT).file_bytes
    before, plan, _ = laid_out(tensors, {"a": 1000}, size)
    assert plan == before
    _, plan, _ = laid_out(tensors, {"a": 1000}, size + 4096)
    assert size < plan.file_bytes <= size + 4096


@given(st.data())
@settings(max_examples=40)
def test_library_reads_every_layout_and_every_tensor_is_aligned(tmp_path_factory, data):
    count = data.draw(st.integers(1, 6))
    shapes = st.sampled_from([(20, MB // 2), (3,), (5, 7), (0,), (MB, 2), (1, 4096)])
    dtypes = st.sampled_from(["U8", "BF16", "F32"])
    tensors = [PlannedTensor(f"t{n}", data.draw(dtypes), data.draw(shapes)) for n in range(count)]
    starts = {t.name: data.draw(st.integers(0, 8192)) * 8 for t in tensors}
    before, plan, sources = laid_out(tensors, starts)
    for old, shard in zip(before.shards, plan.shards, strict=True):
        assert sorted(t.name for t in shard.tensors) == sorted(t.name for t in old.tensors)
        assert shared_bytes(shard, sources) >= shared_bytes(old, sources)
        path = tmp_path_factory.mktemp("layout", numbered=True) / shard.file_name
        path.write_bytes(shard.header())
        with path.open("r+b") as file:
            file.truncate(shard.file_bytes)
        with safe_open(path, framework="np") as file:
            assert sorted(file.keys()) == sorted(t.name for t in shard.tensors)
        for spec in read_header(path).tensors:
            assert spec.start % DTYPES[spec.dtype].width_bytes == 0
            assert spec.start == starts_of(shard)[spec.name]
