"""Files under the wrong name are told apart."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest

from kimi_convert.checkpoints.file_kinds import recognise


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("start", "title", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML page", "login"),
        (b"\xef\xbb\xbf\n  <HTML>", "HTML page", "login"),
        (b"<?xml version='1.0'?><Error>", "XML", "login"),
        (_zip(), "zip archive", "safetensors"),
        (pickle.dumps({"a": 1}, 2), "pickle", "safetensors"),
        (pickle.dumps({"a": 1}), "pickle", "safetensors"),
        (b"GGUF\x03\x00", "GGUF", "safetensors"),
        (b"\x1f\x8b\x08", "gzip", "Unpack"),
    ],
    ids=["lfs", "html", "html-bom", "xml", "zip", "pickle2", "pickle", "gguf", "gzip"],
)
def test_kind_is_named_with_a_next_step(start, title, hint):
    kind = recognise(start)
    assert kind is not None
    assert title in kind.title
    assert hint in kind.hint


@pytest.mark.parametrize("start", [b"", b"{", b"\x00" * 300], ids=["empty", "json", "zeros"])
def test_other_bytes_have_no_kind(start):
    assert recognise(start) is None
