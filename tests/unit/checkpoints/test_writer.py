"""One file: what is planned is written, to the byte; anything else never counts."""

from __future__ import annotations

import array
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kimi_convert.checkpoints import disk
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.errors import ResourceError, VerificationError
from tests.unit.checkpoints.raw_files import open_descriptors

PLANNED = [
    PlannedTensor("a", "I16", (3,)),
    PlannedTensor("b", "U8", (0, 3)),
    PlannedTensor("c", "I16", (2,)),
]
SHARD = plan_shards(PLANNED, 10**9).shards[0]
CONTENT = {"a": b"aaaaaa", "b": b"", "c": b"cccc"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def write_all_of(writer):
    for name, content in CONTENT.items():
        writer.write(name, content)


@given(st.data())
@settings(max_examples=60)
def test_library_reads_back_what_was_written_in_any_chunks(tmp_path_factory, data):
    shapes = data.draw(
        st.dictionaries(
            st.text('abc.é"', min_size=1, max_size=5),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
            min_size=1,
            max_size=5,
        )
    )
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    planned = [PlannedTensor(name, "F32", shape) for name, shape in shapes.items()]
    path = tmp_path_factory.mktemp("written", numbered=True) / "x.safetensors"
    with ShardWriter(path, plan_shards(planned, 10**9).shards[0]) as writer:
        for name, tensor in tensors.items():
            content = tensor.numpy().tobytes()
            cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
            bounds = zip([0, *cuts], [*cuts, len(content)], strict=True)
            writer.write(name, (content[begin:end] for begin, end in bounds))
        writer.finish()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_file_is_the_one_that_the_library_would_write(path):
    """Where the order is the library's own: widest dtype first, then by name."""
    tensors = {
        "a": torch.tensor([1.0, 2.0]),
        "b": torch.tensor(3.0),
        "c": torch.tensor([4, 5, 6]).to(torch.uint8),
    }
    dtypes = {"a": "F32", "b": "F32", "c": "U8"}
    planned = [PlannedTensor(name, dtypes[name], tuple(t.shape)) for name, t in tensors.items()]
    with ShardWriter(path, plan_shards(planned, 10**9).shards[0]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.numpy().tobytes())
        writer.finish()
    theirs = path.with_name("theirs.safetensors")
    save_file(tensors, theirs, {"format": "pt"})
    assert path.read_bytes() == theirs.read_bytes()


def test_hashes_are_those_of_the_header_and_of_the_tensors(path):
    with ShardWriter(path, SHARD) as writer:
        write_all_of(writer)
        written = writer.finish()
    assert written.header_sha256 == hashlib.sha256(SHARD.header()).hexdigest()
    assert written.tensor_sha256 == {
        name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()
    }
    assert (written.name, written.nbytes) == (SHARD.file_name, path.stat().st_size)
    assert written.nbytes == SHARD.file_bytes


@pytest.mark.parametrize(
    "chunk",
    [
        b"cccc",
        bytearray(b"cccc"),
        memoryview(b"cccc"),
        memoryview(array.array("h", [25443, 25443])),
    ],
    ids=["bytes", "bytearray", "view", "view of int16"],
)
@pytest.mark.parametrize("single", [True, False], ids=["at once", "as chunks"])
def test_any_kind_of_bytes_is_taken(path, chunk, single):
    with ShardWriter(path, SHARD) as writer:
        writer.write("a", b"aaaaaa")
        writer.write("b", [])
        writer.write("c", chunk if single else [chunk])
        writer.finish()
    assert path.read_bytes().endswith(b"aaaaaacccc")


def test_writing_in_pieces_writes_everything(path, monkeypatch):
    whole = disk.os.write
    monkeypatch.setattr(disk.os, "write", lambda fd, data: whole(fd, data[:5]))
    with ShardWriter(path, SHARD) as writer:
        write_all_of(writer)
        writer.finish()
    assert path.stat().st_size == SHARD.file_bytes
    assert path.read_bytes().endswith(b"aaaaaacccc")


@pytest.mark.parametrize(
    ("chunks", "found"),
    [
        ([], "0"),
        ([b"aaaaa"], "5"),
        ([b"aaa", b"", b"aa"], "5"),
        ([b"aaaaaaa"], "7 or more"),
        ([b"aaaaaa", b"a", b"a"], "7 or more"),
    ],
)
def test_wrong_number_of_bytes_is_refused(path, chunks, found):
    with ShardWriter(path, SHARD) as writer:
        with pytest.raises(VerificationError, match="planned number of bytes") as caught:
            writer.write("a", chunks)
        assert (caught.value.expected, caught.value.found) == ("6", found)
        assert caught.value.exit_code == 6
        # Even if the tensor is then written once more, the file does not count.
        write_all_of(writer)
        if chunks not in ([], [b"aaaaaaa"]):  # these left no byte behind
            with pytest.raises(VerificationError, match="not finished"):
                writer.finish()


def test_too_many_bytes_stop_the_stream_and_are_not_written(path):
    def endless():
        while True:
            yield b"aaaa"

    with ShardWriter(path, SHARD) as writer, pytest.raises(VerificationError):
        writer.write("a", endless())
    assert path.stat().st_size == SHARD.header_bytes + 4


@pytest.mark.parametrize(
    ("written", "name", "expected"),
    [
        ((), "b", "'a'"),
        (("a",), "a", "'b'"),
        ((), "none", "'a'"),
        (("a", "b", "c"), "d", "no further"),
    ],
)
def test_tensors_out_of_order_are_refused(path, written, name, expected):
    with ShardWriter(path, SHARD) as writer:
        for before in written:
            writer.write(before, CONTENT[before])
        with pytest.raises(VerificationError, match="order of the plan") as caught:
            writer.write(name, b"")
        assert expected in caught.value.expected


def test_next_tensor_follows_the_plan(path):
    with ShardWriter(path, SHARD) as writer:
        seen = []
        while writer.next_tensor:
            seen.append(writer.next_tensor)
            writer.write(seen[-1].name, CONTENT[seen[-1].name])
    assert seen == PLANNED


def test_unfinished_file_does_not_count(path):
    with ShardWriter(path, SHARD) as writer:
        writer.write("a", b"aaaaaa")
        with pytest.raises(VerificationError, match="2 tensors of its plan are missing"):
            writer.finish()


def test_error_of_the_source_passes_through(path):
    def broken():
        yield b"aaa"
        raise OSError(5, "the source's own error")

    with ShardWriter(path, SHARD) as writer, pytest.raises(OSError, match="source's own"):
        writer.write("a", broken())


def test_existing_file_is_not_overwritten(path):
    path.write_bytes(b"precious")
    with pytest.raises(ResourceError):
        ShardWriter(path, SHARD)
    assert path.read_bytes() == b"precious"


def test_file_is_closed_when_its_header_cannot_be_written(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = open_descriptors()
    monkeypatch.setattr(disk.os, "write", full)
    with pytest.raises(ResourceError, match="No space left"):
        ShardWriter(path, SHARD)
    assert open_descriptors() == before


def test_same_calls_give_the_same_bytes(path):
    for number in range(2):
        with ShardWriter(path.with_suffix(f".{number}"), SHARD) as writer:
            write_all_of(writer)
            writer.finish()
    assert path.with_suffix(".0").read_bytes() == path.with_suffix(".1").read_bytes()
