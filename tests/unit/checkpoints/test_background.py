"""Hashes on other threads are those of the bytes; an early sync swallows no error."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from kimi_convert.checkpoints import background
from kimi_convert.checkpoints.background import BackgroundHashes, EarlySync


@pytest.fixture
def hashes():
    opened = BackgroundHashes()
    yield opened
    opened.close()


@pytest.mark.parametrize("nbytes", [0, 10, 300_000])
def test_streams_hash_like_their_bytes_in_their_order(hashes, nbytes):
    contents = [os.urandom(nbytes) for _ in range(5)]
    streams = [hashes.begin(nbytes) for _ in contents]
    for content, stream in zip(contents, streams, strict=True):
        for at in range(0, nbytes, 70_000):
            hashes.submit(stream, memoryview(content)[at : at + 70_000])
    hashes.settle(0)
    assert [stream.digest.hexdigest() for stream in streams] == [
        hashlib.sha256(content).hexdigest() for content in contents
    ]


def test_no_more_is_held_than_was_asked_for(hashes):
    stream = hashes.begin(10**6)
    chunk = memoryview(bytearray(100_000))
    for _ in range(10):
        hashes.submit(stream, chunk)
        hashes.settle(250_000)
        assert sum(nbytes for _, nbytes in hashes._pending) <= 250_000


@pytest.fixture
def descriptor(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        yield file.fileno()


def test_error_of_an_early_sync_comes_out_at_the_end(descriptor, monkeypatch):
    """The system tells it once: the last sync may succeed."""

    def fail(_):
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    sync = EarlySync(descriptor)
    monkeypatch.setattr(background.os, "fsync", fail)
    sync.wrote(background._SYNC_BYTES)
    with pytest.raises(OSError, match="Input/output"):
        sync.finish()
    sync.close()


def test_bytes_are_synced_before_the_end(descriptor, monkeypatch):
    synced = []
    monkeypatch.setattr(background.os, "fsync", synced.append)
    sync = EarlySync(descriptor)
    sync.wrote(background._SYNC_BYTES - 1)
    sync.close()
    assert synced == []
    sync = EarlySync(descriptor)
    sync.wrote(background._SYNC_BYTES)
    sync.close()
    assert synced == [descriptor]


def test_each_part_is_let_go_from_the_cache_once_it_is_synced(descriptor, monkeypatch):
    calls = []
    monkeypatch.setattr(background.os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(background.os, "posix_fadvise", lambda *call: calls.append(call[1:3]))
    sync = EarlySync(descriptor)
    sync.wrote(background._SYNC_BYTES)
    sync._pending.result()
    sync.wrote(background._SYNC_BYTES + 5)
    sync.close()
    assert calls == [
        "fsync",
        (0, background._SYNC_BYTES),
        "fsync",
        (background._SYNC_BYTES, background._SYNC_BYTES + 5),
    ]
