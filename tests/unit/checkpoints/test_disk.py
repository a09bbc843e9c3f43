"""Every refusal of the disk is one error, with numbers."""

from __future__ import annotations

import errno
import os

import pytest

from kimi_convert.checkpoints.disk import disk_errors, free_bytes, sync_folder, write_all
from kimi_convert.errors import ResourceError
from tests.unit.checkpoints.raw_files import open_descriptors


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG]
)
def test_refusal_says_what_is_wanted_and_what_is_free(tmp_path, code):
    with pytest.raises(ResourceError) as caught, disk_errors(tmp_path, doing="x", nbytes=5000):
        raise OSError(code, os.strerror(code))
    error = caught.value
    assert error.exit_code == 5
    assert os.strerror(code) in error.found
    assert "bytes" in error.found
    assert "free" in error.found
    assert error.expected == "room for 5000 bytes (5.0 kB)"


def test_a_full_device_is_a_resource_error(tmp_path):
    """/dev/full gives a real ENOSPC."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(ResourceError, match="No space left"), disk_errors(tmp_path, doing="x"):
            write_all(descriptor, memoryview(b"x"))
    finally:
        os.close(descriptor)


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(ValueError, match="mine"), disk_errors(tmp_path, doing="x"):
        raise ValueError("mine")


def test_error_without_a_number_is_told_in_its_own_words(tmp_path):
    with pytest.raises(ResourceError, match="odd"), disk_errors(tmp_path, doing="x"):
        raise OSError("odd")


def test_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    free = free_bytes(tmp_path / "not" / "yet")
    status = os.statvfs(tmp_path)
    assert free == pytest.approx(status.f_bavail * status.f_frsize, rel=0.01)


def test_unknown_space_is_unknown(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(os, "statvfs", fail)
    assert free_bytes(tmp_path) is None
    with pytest.raises(ResourceError) as caught, disk_errors(tmp_path, doing="x"):
        raise OSError(errno.EIO, "broken")
    assert caught.value.found == "broken"


def test_folder_is_synced(tmp_path):
    before = open_descriptors()
    sync_folder(tmp_path)
    (tmp_path / "f").touch()
    with pytest.raises(NotADirectoryError):
        sync_folder(tmp_path / "f")
    assert open_descriptors() == before
