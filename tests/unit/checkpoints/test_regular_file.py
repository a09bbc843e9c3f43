"""Only plain files are opened, and never waited for."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.errors import CheckpointError


def _read(path, nbytes=1, offset=0):
    with open_regular(path) as descriptor:
        return read_exactly(descriptor, nbytes, offset=offset, path=path)


def test_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a plain file"):
        _read(tmp_path / "pipe")


def test_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a plain file"):
        _read(tmp_path)


def test_device_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a plain file"):
        _read(tmp_path / "link")


def test_socket_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(CheckpointError):
            _read(tmp_path / "s")


@pytest.mark.parametrize("target", ["nothing", "link"], ids=["dangling", "loop"])
def test_link_to_nothing_is_refused(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(CheckpointError):
        _read(tmp_path / "link")


def test_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        _read(tmp_path / "none")


def test_bytes_are_read_from_the_offset(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    assert _read(tmp_path / "f", 3, 4) == b"456"
    assert _read(tmp_path / "f", 0, 99) == b""


def test_a_read_that_comes_in_pieces_is_put_together(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"0123456789")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:3]], at))
    assert _read(tmp_path / "f", 10) == b"0123456789"


def test_short_file_says_what_was_expected_and_found(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    with pytest.raises(CheckpointError, match="expected at least 12 bytes, found 10 bytes"):
        _read(tmp_path / "f", 5, 7)


def test_failing_disk_is_a_checkpoint_error(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"0123456789")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        _read(tmp_path / "f")
