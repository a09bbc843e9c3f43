"""What a file is when it is not what its name says: pointer, web page, archive, pickle.

Only asked after a file failed to parse, so that a lucky match cannot refuse a good file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file that is often found under the wrong name."""

    start: bytes  # lower case; white space before it is skipped
    title: str
    hint: str


_DOWNLOAD_AGAIN = "Download the file again; a page like this often means that a login is needed."
_GET_SAFETENSORS = (
    "Get the checkpoint in safetensors format, or save it with `save_pretrained` of transformers."
)

_KINDS = (
    FileKind(
        b"version https://git-lfs",
        "a Git LFS pointer, not the file that it points to",
        "Run `git lfs pull` in the folder of the checkpoint.",
    ),
    FileKind(b"<!doctype", "an HTML page", _DOWNLOAD_AGAIN),
    FileKind(b"<html", "an HTML page", _DOWNLOAD_AGAIN),
    FileKind(b"<?xml", "an XML document", _DOWNLOAD_AGAIN),
    FileKind(b"pk\x03\x04", "a zip archive, such as a PyTorch pickle file", _GET_SAFETENSORS),
    FileKind(b"\x80\x02", "a pickle file", _GET_SAFETENSORS),
    FileKind(b"\x80\x03", "a pickle file", _GET_SAFETENSORS),
    FileKind(b"\x80\x04", "a pickle file", _GET_SAFETENSORS),
    FileKind(b"\x80\x05", "a pickle file", _GET_SAFETENSORS),
    FileKind(b"gguf", "a GGUF file", _GET_SAFETENSORS),
    FileKind(b"\x1f\x8b", "a gzip file", "Unpack the file first."),
)

SNIFF_BYTES = 256


def recognise(start: bytes) -> FileKind | None:
    """Return the kind of a file from its first `SNIFF_BYTES` bytes, or None if unknown."""
    head = start[:SNIFF_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for kind in _KINDS if head.startswith(kind.start)), None)
