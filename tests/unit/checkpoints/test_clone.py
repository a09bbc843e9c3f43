"""Blocks that are shared instead of written: the same file, whatever the file system says."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct

import pytest

from kimi_convert.checkpoints import clone
from kimi_convert.checkpoints.clone import Extent
from kimi_convert.checkpoints.index import ShardFile
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.errors import CheckpointError, ResourceError
from tests.cloning_disk import KINDS, cloning_disk

MB = 2**20
(SHARD,) = plan_shards(
    [
        PlannedTensor("a", "U8", (3 * MB + 5,)),
        PlannedTensor("b", "U8", (100,)),
        PlannedTensor("c", "U8", (2 * MB,)),
    ],
    10**9,
).shards
CONTENT = {t.name: os.urandom(t.nbytes) for t in SHARD.tensors}
BEFORE = {"a": SHARD.header_bytes % 4096, "b": 0, "c": 77}  # the last one cannot be shared


@pytest.fixture(scope="module", params=KINDS)
def disk(request, tmp_path_factory):
    with cloning_disk(request.param, tmp_path_factory.mktemp(request.param)) as folder:
        yield folder


def sources(folder, content=None):
    """Write each tensor into a file of its own, at a place in a block."""
    extents = {}
    for name, data in (content or CONTENT).items():
        path = folder / f"{name}.source"
        path.write_bytes(bytes(BEFORE[name]) + data)
        status = path.stat()
        file = ShardFile(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        extents[name] = Extent(file, BEFORE[name])
    return extents


def write(path, extents, chunk_bytes=MB // 3):
    with ShardWriter(path, SHARD, extents) as writer:
        for name, data in CONTENT.items():
            chunks = (data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes))
            writer.write(name, chunks)
        return writer.finish()


@pytest.fixture
def expected(tmp_path):
    """What is written without any source: the bytes, and the hashes."""
    written = write(tmp_path / "plain", {})
    return (tmp_path / "plain").read_bytes(), written


def check(path, written, expected):
    data, plain = expected
    assert path.read_bytes() == data
    assert written.tensor_sha256 == plain.tensor_sha256
    assert written.header_sha256 == plain.header_sha256
    for name, content in CONTENT.items():
        assert written.tensor_sha256[name] == hashlib.sha256(content).hexdigest()


class System:
    """Stands in for the system's call: copies, or refuses from some call on."""

    def __init__(self, error=None, after=0):
        self.error, self.left, self.calls = error, after, []

    def __call__(self, target, request, argument):
        assert request == 0x4020940D
        source, begin, nbytes, at = struct.unpack("=qQQQ", argument)
        assert begin % 4096 == nbytes % 4096 == at % 4096 == 0 < nbytes
        if self.error and not self.left:
            raise OSError(self.error, os.strerror(self.error))
        self.left -= 1
        self.calls.append((begin, nbytes, at))
        os.pwrite(target, os.pread(source, nbytes, begin), at)


@pytest.mark.parametrize("chunk_bytes", [MB // 3, 4096, 7 * MB])
def test_shared_blocks_are_not_written(tmp_path, monkeypatch, expected, chunk_bytes):
    extents = sources(tmp_path)
    system = System()
    monkeypatch.setattr(clone.fcntl, "ioctl", system)
    wrote = []
    whole_write = os.write

    def count(descriptor, data):
        wrote.append(len(data))
        return whole_write(descriptor, data)

    monkeypatch.setattr(os, "write", count)
    written = write(tmp_path / "out", extents, chunk_bytes)
    check(tmp_path / "out", written, expected)
    assert system.calls == [(4096, 3 * MB - 4096, 4096)]
    assert sum(wrote) == SHARD.file_bytes - (3 * MB - 4096)


@pytest.mark.parametrize(
    "error",
    [
        errno.EOPNOTSUPP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EPERM,
        errno.EIO,
    ],
)
def test_what_the_file_system_refuses_is_written_and_not_tried_again(
    tmp_path, monkeypatch, expected, error
):
    extents = sources(tmp_path)
    extents["c"] = extents["a"]
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(clone.fcntl, "ioctl", refuse)
    check(tmp_path / "out", write(tmp_path / "out", extents), expected)
    assert len(asked) == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told(tmp_path, monkeypatch, error):
    monkeypatch.setattr(clone.fcntl, "ioctl", System(error))
    with pytest.raises(ResourceError, match="cannot write") as caught:
        write(tmp_path / "out", sources(tmp_path))
    assert os.strerror(error) in caught.value.found
    assert caught.value.exit_code == 5


def test_source_that_changed_before_it_was_shared_is_told(tmp_path, monkeypatch):
    extents = sources(tmp_path)
    monkeypatch.setattr(clone.fcntl, "ioctl", System())
    path = extents["a"].file.path
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        write(tmp_path / "out", extents)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        write(tmp_path / "out2", extents)


def test_real_disk_shares_and_gives_the_same_file(disk, expected, monkeypatch):
    extents = sources(disk)
    calls = []
    real = fcntl.ioctl

    def call(*arguments):
        real(*arguments)
        calls.append(arguments)

    monkeypatch.setattr(clone.fcntl, "ioctl", call)
    path = disk / "out"
    check(path, write(path, extents), expected)
    assert len(calls) == 1  # and it was not refused
    source = extents["a"].file.path
    source.write_bytes(b"x" * source.stat().st_size)  # what changes now is the source alone
    assert path.read_bytes() == expected[0]
    path.unlink()


def test_real_disk_does_not_share_with_another(disk, tmp_path, expected):
    path = disk / "out"
    check(path, write(path, sources(tmp_path)), expected)
    path.unlink()
