"""Reading: the right bytes, bounded memory, and no reading on when a file changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.errors import CheckpointError
from tests.unit.checkpoints.raw_files import write_checkpoint

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "row": torch.arange(9).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "bytes": torch.arange(100, dtype=torch.uint8),
}


@pytest.fixture
def reader(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with CheckpointReader(open_index(tmp_path)) as opened:
        yield opened


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_is_what_was_saved(reader, name):
    found = reader.tensor(name)
    assert found.dtype == TENSORS[name].dtype
    assert torch.equal(found, TENSORS[name])


@pytest.mark.parametrize("name", TENSORS)
def test_chunks_are_the_bytes_of_the_tensor(reader, name):
    expected = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert b"".join(reader.chunks(name)) == expected


@given(chunk_bytes=st.integers(1, 200))
@settings(max_examples=30)
def test_chunks_have_the_asked_size_and_nothing_is_lost(tmp_path_factory, chunk_bytes):
    folder = tmp_path_factory.mktemp("chunks", numbered=True)
    content = bytes(range(100))
    write_checkpoint(
        folder, {"one.safetensors": {"before": b"b" * 7, "t": content, "after": b"a"}}
    )
    with CheckpointReader(open_index(folder)) as opened:
        chunks = [bytes(chunk) for chunk in opened.chunks("t", chunk_bytes=chunk_bytes)]
    assert b"".join(chunks) == content
    assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_bytes}


def test_chunks_that_are_kept_stay_as_they_are(reader):
    kept = [*reader.chunks("bytes", chunk_bytes=40), *reader.chunks("bytes", chunk_bytes=40)]
    assert b"".join(kept) == 2 * TENSORS["bytes"].numpy().tobytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 0), (1, 3), (4, 5), (5, 5)])
def test_rows_are_a_slice_of_the_first_axis(reader, start, stop):
    assert torch.equal(reader.rows("matrix", start, stop), TENSORS["matrix"][start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [("matrix", -1, 2), ("matrix", 3, 2), ("matrix", 0, 6), ("scalar", 0, 1), ("scalar", 0, 0)],
)
def test_rows_that_do_not_exist_are_refused(reader, name, start, stop):
    with pytest.raises(CheckpointError, match="has no rows"):
        reader.rows(name, start, stop)


READS = {
    "tensor": lambda reader, name: reader.tensor(name),
    "rows": lambda reader, name: reader.rows(name, 0, 1),
    "chunks": lambda reader, name: list(reader.chunks(name)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_unknown_tensor_is_refused(reader, read):
    with pytest.raises(CheckpointError, match="no tensor 'none'"):
        read(reader, "none")


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def cut(path):
    os.truncate(path, 64)


def touch(path):
    os.utime(path, (1, 1))


def replace(path):
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-1] + b"?")
    other.rename(path)


@pytest.mark.parametrize("opened_before", [False, True], ids=["before open", "while open"])
@pytest.mark.parametrize("change", [grow, cut, touch, replace, os.unlink])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_changed_file_is_refused(reader, read, change, opened_before):
    if opened_before:
        read(reader, "matrix")
    change(reader.index.shards["model.safetensors"].path)
    with pytest.raises(CheckpointError):
        read(reader, "matrix")


def test_file_that_changes_between_two_chunks_is_refused(reader):
    chunks = reader.chunks("bytes", chunk_bytes=50)
    next(chunks)
    touch(reader.index.shards["model.safetensors"].path)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        next(chunks)


def test_file_replaced_between_check_and_open_is_refused(reader, monkeypatch):
    from kimi_convert.checkpoints import reader as reader_module

    whole = reader_module.safe_open

    def replaced_first(path, **options):
        replace(path)
        return whole(path, **options)

    monkeypatch.setattr(reader_module, "safe_open", replaced_first)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        reader.tensor("matrix")


@pytest.mark.parametrize("read", [READS["tensor"], READS["rows"]], ids=["tensor", "rows"])
def test_refusal_of_the_library_is_a_checkpoint_error(reader, read):
    """A file can be swapped for one that looks the same from outside: size and time."""
    file = reader.index.shards["model.safetensors"]
    file.path.write_bytes(b"\xff" * file.nbytes)
    os.utime(file.path, ns=(file.mtime_ns, file.mtime_ns))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(reader, "matrix")


@pytest.mark.parametrize("read", [READS["tensor"], READS["rows"]], ids=["tensor", "rows"])
def test_tensor_that_is_gone_from_the_file_is_a_checkpoint_error(reader, read):
    file = reader.index.shards["model.safetensors"]
    file.path.write_bytes(file.path.read_bytes().replace(b'"matrix"', b'"matrax"'))
    os.utime(file.path, ns=(file.mtime_ns, file.mtime_ns))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(reader, "matrix")


@pytest.mark.parametrize("name", ["with space", "模型", "-dash", "new\nline"])
def test_folder_of_any_name_is_read(tmp_path, name):
    write_checkpoint(tmp_path / name, {"one.safetensors": {"t": b"abc"}})
    with CheckpointReader(open_index(tmp_path / name)) as opened:
        assert b"".join(opened.chunks("t")) == b"abc"
        assert bytes(opened.tensor("t").tolist()) == b"abc"


def test_folder_whose_name_is_not_utf_8_is_read_or_refused(tmp_path):
    """The library cannot open such a path."""
    folder = write_checkpoint(tmp_path / os.fsdecode(b"\xff"), {"one.safetensors": {"t": b"abc"}})
    with CheckpointReader(open_index(folder)) as opened:
        assert b"".join(opened.chunks("t")) == b"abc"
        with pytest.raises(CheckpointError, match="not valid UTF-8"):
            opened.tensor("t")


def test_reading_goes_on_after_release(reader):
    reader.tensor("matrix")
    reader.release()
    reader.release()
    assert torch.equal(reader.tensor("matrix"), TENSORS["matrix"])


def test_tensor_outlives_its_reader(reader):
    held = reader.tensor("matrix")
    reader.release()
    assert torch.equal(held, TENSORS["matrix"])


def test_writing_into_a_tensor_does_not_reach_the_file(reader):
    before = reader.index.shards["model.safetensors"].path.read_bytes()
    reader.tensor("matrix").fill_(1)
    assert reader.index.shards["model.safetensors"].path.read_bytes() == before


def test_one_handle_for_each_file(tmp_path, monkeypatch):
    from kimi_convert.checkpoints import reader as reader_module

    write_checkpoint(
        tmp_path, {f"{i}.safetensors": {f"{i}a": b"x", f"{i}b": b"y"} for i in range(3)}
    )
    opened = []
    whole = reader_module.safe_open

    def counted(path, **options):
        opened.append(path.name)
        return whole(path, **options)

    monkeypatch.setattr(reader_module, "safe_open", counted)
    with CheckpointReader(open_index(tmp_path)) as reader:
        assert opened == []
        for name in ("0a", "0b", "1a", "0a"):
            reader.tensor(name)
    assert opened == ["0.safetensors", "1.safetensors"]


MEBIBYTE = 2**20
MEASURE = """
import json, sys
from kimi_convert.checkpoints import CheckpointReader, open_index

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

reader = CheckpointReader(open_index(sys.argv[1]))
found = {}
start = resident()
for chunk in reader.chunks("big"):
    pass
found["chunks"] = resident() - start
found["torch after chunks"] = "torch" in sys.modules
reader.release()
import torch
torch.ones(1000).sum()
reader.tensor("small").sum()
start = resident()
reader.rows("big", 1000, 1016).sum()
found["rows"] = resident() - start
tensor = reader.tensor("big")
found["mapped"] = resident() - start
tensor.sum()
found["touched"] = resident() - start
reader.release()
found["released, tensor held"] = resident() - start
del tensor
found["released"] = resident() - start
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """Resident bytes of a process that reads a tensor of 96 MiB, above those before."""
    folder = tmp_path_factory.mktemp("resident")
    big = torch.ones(96 * 256, 1024)
    save_file({"big": big, "small": torch.ones(10)}, folder / "model.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, folder], check=True, capture_output=True, timeout=60
    )
    return json.loads(run.stdout)


def test_chunks_hold_no_more_than_a_few_pieces(resident):
    assert resident["chunks"] < 24 * MEBIBYTE


def test_chunks_need_no_torch(resident):
    assert resident["torch after chunks"] is False


def test_rows_do_not_touch_the_rest(resident):
    assert resident["rows"] < 8 * MEBIBYTE


def test_tensor_is_not_read_before_it_is_used(resident):
    assert resident["mapped"] < 8 * MEBIBYTE
    assert resident["touched"] > 90 * MEBIBYTE


def test_release_gives_the_pages_back_once_no_tensor_is_held(resident):
    assert resident["released, tensor held"] > 90 * MEBIBYTE
    assert resident["released"] < 8 * MEBIBYTE
