"""What a repository says that it holds; checked, since anybody may have written it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from kimi_convert.errors import InputError

_NO_FILES = ("directory", "submodule")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit, as the repository lists it."""

    path: str
    nbytes: int
    git_sha1: str  # of the content, or of the LFS pointer
    sha256: str | None  # of the content; None for small files, which git holds

    @property
    def etag(self) -> str:
        """What the file is called where content gives the name."""
        return self.sha256 or self.git_sha1


def files_of(entries: Iterable[object], *, where: str) -> dict[str, RemoteFile]:
    """Return the files among the entries of a listing, by path.

    Raises:
        InputError: one does not make sense.
    """
    files: dict[str, RemoteFile] = {}
    for entry in entries:
        fields = _object(entry)
        if fields.get("type") in _NO_FILES:
            continue
        file = _file(fields)
        if file is None:
            raise senseless(where, fields.get("path"))
        files[file.path] = file
    return files


def senseless(where: str, found: object) -> InputError:
    """Return the error for a listing that is none."""
    return InputError(
        "the repository's listing does not make sense",
        where=where,
        expected="a size and a hash for each file",
        found=ascii(found)[:120],
        hint="Check HF_ENDPOINT: this may not be a Hub.",
    )


def _file(fields: Mapping[str, object]) -> RemoteFile | None:
    """Return a file as the repository lists it, or None if that makes no sense."""
    path, git_sha1, lfs = fields.get("path"), fields.get("oid"), _object(fields.get("lfs"))
    size, sha256 = lfs.get("size", fields.get("size")), lfs.get("oid")
    if (
        isinstance(path, str)
        and type(size) is int
        and size >= 0
        and isinstance(git_sha1, str)
        and re.fullmatch(r"[0-9a-f]{40}", git_sha1)
        and (sha256 is None or isinstance(sha256, str))
        and (sha256 is None or re.fullmatch(r"[0-9a-f]{64}", sha256))
    ):
        return RemoteFile(path, size, git_sha1, sha256)
    return None


def _object(value: object) -> dict[str, object]:
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}
