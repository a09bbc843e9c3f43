"""Hashes against hashlib and against sha256 of nothing."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.checkpoints.hashing import sha256_of_chunks, sha256_of_file
from kimi_convert.errors import CheckpointError


@given(st.lists(st.binary(max_size=50)))
def test_chunks_hash_like_their_whole(chunks):
    assert sha256_of_chunks(chunks) == hashlib.sha256(b"".join(chunks)).hexdigest()


@pytest.mark.parametrize("nbytes", [0, 1, 1_000_003])
def test_file_hashes_like_its_bytes(tmp_path, nbytes):
    content = bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)
    (tmp_path / "f").write_bytes(content)
    assert sha256_of_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        sha256_of_file(tmp_path / "none")


def test_failing_disk_is_a_checkpoint_error(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        sha256_of_file(tmp_path / "f")
