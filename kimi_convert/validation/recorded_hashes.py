"""The SHA-256 hashes that a checkpoint folder records of itself: conversion.json, SHA256SUMS.

Only reads what was recorded; `integrity` holds it against the bytes. What is in these files is
not trusted: a name that is not a plain file name is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import MAX_JSON_BYTES, as_object, parse_object
from kimi_convert.errors import CheckpointError

CONVERSION_FILE = "conversion.json"
SUMS_FILE = "SHA256SUMS"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


@dataclass(frozen=True, slots=True)
class FileHash:
    """One file as it was when it was recorded."""

    sha256: str  # hex, lower case
    nbytes: int | None  # None where only the hash was recorded
    of_header: bool = False  # of a file of weights, whose tensors have hashes of their own


@dataclass(frozen=True, slots=True)
class RecordedHashes:
    """What one file of the folder records."""

    source: str  # its name
    files: Mapping[str, FileHash]
    tensors: Mapping[str, str]  # tensor name -> hex


def read_recorded_hashes(folder: Path) -> Iterator[RecordedHashes]:
    """Read every file in `folder` that records hashes.

    Raises:
        CheckpointError: such a file is there and is not understood.
    """
    for name, parse in _PARSERS.items():
        path = folder / name
        if path.exists():
            yield parse(_read(path), path)


def _read(path: Path) -> bytes:
    with open_regular(path) as descriptor:
        # One byte more than is parsed, so that a file that is too large is seen as that.
        nbytes = min(os.fstat(descriptor).st_size, MAX_JSON_BYTES + 1)
        return read_exactly(descriptor, nbytes, offset=0, path=path)


def _parse_conversion(data: bytes, path: Path) -> RecordedHashes:
    """Read the hashes of the folder as it is: an export's record, else the conversion's."""
    document = parse_object(data, where=path)
    record = _object(document["export"], "export", path) if "export" in document else document
    files: dict[str, FileHash] = {}
    for name, value in _object(record.get("files"), "files", path).items():
        entry = _object(value, f"files.{name}", path)
        size = entry.get("size")
        if isinstance(size, bool) or not isinstance(size, int):
            raise _not_understood(path, f"files.{name}.size", "a number of bytes", size)
        of_header = "header_sha256" in entry
        digest = _hash(entry, f"files.{name}", path, "header_sha256" if of_header else "sha256")
        files[_plain_name(name, path)] = FileHash(digest, size, of_header)
    tensors = {
        name: _hash(_object(value, f"tensors.{name}", path), f"tensors.{name}", path)
        for name, value in _object(record.get("tensors"), "tensors", path).items()
    }
    return RecordedHashes(path.name, files, tensors)


def _parse_sums(data: bytes, path: Path) -> RecordedHashes:
    """Read the lines that `sha256sum` prints."""
    files: dict[str, FileHash] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        found = _SUM_LINE.fullmatch(line)
        if found is None:
            raise _not_understood(path, "line", "a hash, two spaces and a file name", line)
        files[_plain_name(found[2], path)] = FileHash(found[1].lower(), None)
    return RecordedHashes(path.name, files, {})


_PARSERS: Mapping[str, Callable[[bytes, Path], RecordedHashes]] = {
    CONVERSION_FILE: _parse_conversion,
    SUMS_FILE: _parse_sums,
}


def _object(value: object, field: str, path: Path) -> dict[str, object]:
    found = as_object(value)
    if found is None:
        raise _not_understood(path, field, "an object", value)
    return found


def _hash(entry: Mapping[str, object], field: str, path: Path, key: str = "sha256") -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _not_understood(path, f"{field}.{key}", "64 hexadecimal digits", value)
    return value


def _plain_name(name: str, path: Path) -> str:
    if name != Path(name).name or name in {"", ".", ".."} or not name.isprintable():
        raise _not_understood(path, "file name", "the plain name of a file", name)
    return name


def _not_understood(path: Path, field: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"recorded hashes are not understood at {quoted(field)}",
        where=path,
        expected=expected,
        found=quoted(found),
    )
